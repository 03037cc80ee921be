/*
 * A VMM that resumes a snapshot as Firecracker does with an Uffd back-end: anonymous memory in two
 * regions, registered with its own userfaultfd, both handed over by one JSON message on a stream
 * socket that is closed afterwards. It then does what its standard input says, a line each, and
 * answers each with a line. With `close` it keeps no copy of the descriptor; Firecracker does.
 * With `write-protect` it registers for that as well; with `claim` it says that its pages are huge.
 *
 *   vmm SOCKET SIZE_MIB PAGE_BYTES [user-mode-only | unregistered | write-protect | claim | close]
 *
 *   verify               every word of memory, from four threads: how many are wrong
 *   remove FIRST COUNT   gives 4 KiB pages back, as a balloon does (MADV_DONTNEED)
 *   zeros FIRST COUNT    how many words of these pages are not zero
 *
 * The word at byte o of the memory file is WORD(o), and 0 in each tenth page.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

#define PAGE 4096u
#define WORD(o) (((o) + UINT64_C(0x9e3779b97f4a7c15)) * UINT64_C(0xbf58476d1ce4e5b9))
enum { REGIONS = 2, THREADS = 4 };

static struct region {
    char *start;
    uint64_t size, offset;
} regions[REGIONS];

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t expected(uint64_t offset)
{
    return offset / PAGE % 10 == 3 ? 0 : WORD(offset);
}

static char *at(uint64_t offset)
{
    for (int i = 0; i < REGIONS; i++) {
        if (offset - regions[i].offset < regions[i].size)
            return regions[i].start + (offset - regions[i].offset);
    }
    exit(3);
}

static void *verify(void *argument)
{
    uintptr_t thread = (uintptr_t)argument, wrong = 0;

    for (int i = 0; i < REGIONS; i++) {
        uint64_t pages = regions[i].size / PAGE;

        /* Each thread has its own pages, in an order that is not that of the file. */
        for (uint64_t n = thread; n < pages; n += THREADS) {
            uint64_t begin = n * 7919 % pages * PAGE;

            for (uint64_t o = begin; o < begin + PAGE; o += sizeof(uint64_t))
                wrong += *(volatile uint64_t *)(regions[i].start + o) !=
                         expected(regions[i].offset + o);
        }
    }
    return (void *)wrong;
}

static uint64_t verify_all(void)
{
    pthread_t threads[THREADS];
    uint64_t wrong = 0;

    for (uintptr_t i = 0; i < THREADS; i++) {
        if (pthread_create(&threads[i], NULL, verify, (void *)i))
            exit(4);
    }
    for (int i = 0; i < THREADS; i++) {
        void *result;

        pthread_join(threads[i], &result);
        wrong += (uintptr_t)result;
    }
    return wrong;
}

static void hand_over(const char *path, int uffd, uint64_t page_size)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = { { 0 } };
    char text[1024] = "[";
    struct iovec part = { .iov_base = text };
    struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
                             .msg_controllen = sizeof(control.bytes) };
    struct cmsghdr *item = CMSG_FIRSTHDR(&header);
    int channel = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    for (int i = 0; i < REGIONS; i++)
        sprintf(text + strlen(text),
                "%s{\"base_host_virt_addr\":%" PRIuPTR ",\"size\":%" PRIu64 ",\"offset\":%" PRIu64
                ",\"page_size\":%" PRIu64 ",\"page_size_kib\":%" PRIu64 "}",
                i ? "," : "", (uintptr_t)regions[i].start, regions[i].size, regions[i].offset,
                page_size, page_size);
    strcat(text, "]");
    part.iov_len = strlen(text);
    item->cmsg_level = SOL_SOCKET;
    item->cmsg_type = SCM_RIGHTS;
    item->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(item), &uffd, sizeof(int));
    strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
    if (channel < 0 || connect(channel, (struct sockaddr *)&address, sizeof(address)) < 0)
        die("connect");
    if (sendmsg(channel, &header, 0) != (ssize_t)part.iov_len)
        die("sendmsg");
    close(channel);
}

int main(int argc, char **argv)
{
    struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
    uint64_t size, page_size, first, count;
    char line[128];
    const char *how;
    int device, uffd, user_mode_only, unregistered;

    if (argc < 4)
        return 2;
    how = argc > 4 ? argv[4] : "";
    user_mode_only = !strcmp(how, "user-mode-only");
    unregistered = !strcmp(how, "unregistered");
    size = strtoull(argv[2], NULL, 0) << 20;
    page_size = strtoull(argv[3], NULL, 0);
    device = user_mode_only ? -1 : open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    uffd = device < 0 ? -1 : ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd,
                            O_CLOEXEC | O_NONBLOCK | (user_mode_only ? UFFD_USER_MODE_ONLY : 0));
    if (page_size != PAGE)
        api.features |= UFFD_FEATURE_MISSING_HUGETLBFS;
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0)
        die("userfaultfd");
    /* Three quarters below the gap of a PC, the rest above it; the later one first. */
    regions[0] = (struct region){ NULL, size / 4, size / 4 * 3 };
    regions[1] = (struct region){ NULL, size / 4 * 3, 0 };
    for (int i = 0; i < REGIONS; i++) {
        struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };

        regions[i].start = mmap(NULL, regions[i].size, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE |
                                    (page_size == PAGE ? 0 : MAP_HUGETLB),
                                -1, 0);
        if (regions[i].start == MAP_FAILED)
            die("mmap");
        if (!strcmp(how, "write-protect"))
            reg.mode |= UFFDIO_REGISTER_MODE_WP;
        reg.range.start = (uintptr_t)regions[i].start;
        reg.range.len = regions[i].size;
        if (!unregistered && ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
            die("UFFDIO_REGISTER");
    }
    hand_over(argv[1], uffd, strcmp(how, "claim") ? page_size : 2u << 20);
    if (!strcmp(how, "close"))
        close(uffd);
    puts("handed over");
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin)) {
        uint64_t answer = 0;

        if (!strncmp(line, "verify", 6)) {
            answer = verify_all();
        } else if (sscanf(line, "remove %" SCNu64 " %" SCNu64, &first, &count) == 2) {
            if (madvise(at(first * PAGE), count * PAGE, MADV_DONTNEED) < 0)
                die("madvise");
        } else if (sscanf(line, "zeros %" SCNu64 " %" SCNu64, &first, &count) == 2) {
            for (uint64_t o = 0; o < count * PAGE; o += sizeof(uint64_t))
                answer += *(volatile uint64_t *)(at(first * PAGE) + o) != 0;
        } else {
            return 5;
        }
        printf("%" PRIu64 "\n", answer);
        fflush(stdout);
    }
    return 0;
}
