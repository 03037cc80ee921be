/* How the programs of this folder hand a userfaultfd over, and what a page holds. */
#ifndef HANDOVER_H
#define HANDOVER_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

struct handover {
    uint64_t address;
    uint64_t length;
    uint64_t page_size;
};

static inline void die(const char *what)
{
    perror(what);
    exit(2);
}

/* splitmix64's finaliser: swapped, shifted and stale words all differ. */
static inline uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static inline void send_handover(int socket, int fd, uint64_t address, uint64_t length,
                                 uint64_t page_size)
{
    struct handover h = { address, length, page_size };
    struct iovec iov = { &h, sizeof(h) };
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof(int))];
    } control = { 0 };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
                        .msg_controllen = sizeof(control.space) };
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);

    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    if (sendmsg(socket, &m, 0) != (ssize_t)sizeof(h))
        die("handing the userfaultfd over");
}

static inline int receive_handover(int socket, struct handover *h)
{
    struct iovec iov = { h, sizeof(*h) };
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space,
                        .msg_controllen = sizeof(control.space) };
    int fd;

    if (recvmsg(socket, &m, 0) != (ssize_t)sizeof(*h) || !CMSG_FIRSTHDR(&m))
        die("receiving the userfaultfd");
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(fd));
    return fd;
}

#endif
