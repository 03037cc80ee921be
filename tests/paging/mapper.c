/*
 * A mapper that does what a test tells it: the process whose memory is paged.
 *
 *   mapper memfd|anonymous|hugetlb|/FILE PAGES   (the test is at the other end of standard input)
 *
 * A file is one on hugetlbfs, of which nothing is reserved.
 *
 * Hands its userfaultfd over, then takes lines "ID OPERATION ARGUMENTS" and answers each with
 * "ID RESULT". Every command runs in a thread of its own, so one that waits for a page holds up
 * nothing but itself. Pages count in the back-end's page size.
 *
 *   read PAGE                 its first word, in hexadecimal
 *   write PAGE VALUE          stores the first word
 *   dump FIRST COUNT PATH     writes the pages to a file: the kernel is the one that faults
 *   remove FIRST COUNT        MADV_DONTNEED (anonymous) or MADV_REMOVE: sends REMOVE events
 *   storm FIRST COUNT         the same without an end, until:
 *   calm 0                    ends storms, which then answer how often they removed
 *   punch FIRST COUNT         hole punched in the memfd: sends no event
 *   unmap FIRST COUNT         munmap
 *   reuse FIRST COUNT         munmap, then other memory there, under a userfaultfd of its own that
 *                             nobody serves (registered alike, so that only the owner differs)
 *   resident FIRST COUNT      how many of the pages are there, by the page table
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "handover.h"

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

static char *memory;
static int memory_fd = -1;
static uint64_t page_size = 4096;
static atomic_int calm;

static int dump(const char *from, uint64_t length, const char *path)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    int result = 0;

    while (fd >= 0 && length && !result) {
        ssize_t n = write(fd, from, length);

        if (n < 0) {
            result = -1;
        } else {
            from += n;
            length -= (uint64_t)n;
        }
    }
    if (fd < 0 || close(fd) < 0)
        result = -1;
    return result;
}

static int give_back(uint64_t first, uint64_t count)
{
    return madvise(memory + first * page_size, count * page_size,
                   memory_fd < 0 ? MADV_DONTNEED : MADV_REMOVE);
}

static int open_userfaultfd(void)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int uffd = device < 0 ? -1 : ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);

    if (device >= 0)
        close(device);
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    return uffd;
}

static int reuse(void *at, uint64_t length)
{
    struct uffdio_api api = { .api = UFFD_API };
    struct uffdio_register range = { .range = { (uintptr_t)at, length },
                                     .mode = UFFDIO_REGISTER_MODE_MISSING };
    int uffd = open_userfaultfd(); /* kept: closing it would unregister */

    if (munmap(at, length) < 0 || mmap(at, length, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != at)
        return -1;
    return ioctl(uffd, UFFDIO_API, &api) < 0 ? -1 : ioctl(uffd, UFFDIO_REGISTER, &range);
}

static int resident(const char *from, uint64_t count, uint64_t *ret)
{
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t entry;

    for (*ret = 0; fd >= 0 && count--; from += page_size) {
        if (pread(fd, &entry, 8, (off_t)((uintptr_t)from / 4096 * 8)) != 8)
            return -1;
        *ret += entry >> 62 != 0; /* present or swapped, proc(5) */
    }
    return fd < 0 ? -1 : close(fd);
}

static void *run(void *argument)
{
    char *line = argument, operation[16], path[256] = "", reply[64];
    uint64_t id, first, second = 0, word = 0;
    int result = 0;

    if (sscanf(line, "%" SCNu64 " %15s %" SCNu64 " %" SCNu64 " %255s", &id, operation, &first,
               &second, path) < 3)
        die(line);
    if (!strcmp(operation, "read")) {
        word = *(volatile uint64_t *)(memory + first * page_size);
    } else if (!strcmp(operation, "write")) {
        *(volatile uint64_t *)(memory + first * page_size) = second;
    } else if (!strcmp(operation, "dump")) {
        result = dump(memory + first * page_size, second * page_size, path);
    } else if (!strcmp(operation, "remove")) {
        result = give_back(first, second);
    } else if (!strcmp(operation, "storm")) {
        for (; !calm && !result; word++)
            result = give_back(first, second);
    } else if (!strcmp(operation, "calm")) {
        calm = 1;
    } else if (!strcmp(operation, "punch")) {
        result = fallocate(memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                           (off_t)(first * page_size), (off_t)(second * page_size));
    } else if (!strcmp(operation, "unmap")) {
        result = munmap(memory + first * page_size, second * page_size);
    } else if (!strcmp(operation, "reuse")) {
        result = reuse(memory + first * page_size, second * page_size);
    } else if (!strcmp(operation, "resident")) {
        result = resident(memory + first * page_size, second, &word);
    } else {
        die(operation);
    }
    if (result < 0)
        snprintf(reply, sizeof(reply), "%" PRIu64 " error %d\n", id, errno);
    else
        snprintf(reply, sizeof(reply), "%" PRIu64 " %" PRIx64 "\n", id, word);
    if (send(STDIN_FILENO, reply, strlen(reply), MSG_NOSIGNAL) < 0)
        exit(0);
    free(line);
    return NULL;
}

int main(int argc, char **argv)
{
    uint64_t length;
    FILE *commands;
    char *line = NULL;
    size_t room = 0;
    int uffd;

    if (argc != 3)
        die("usage: mapper MEMORY PAGES");
    if (!strcmp(argv[1], "anonymous")) {
        length = strtoull(argv[2], NULL, 0) * page_size;
        memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        madvise(memory, length, MADV_NOHUGEPAGE);
    } else if (argv[1][0] == '/') {
        page_size = 2u << 20;
        length = strtoull(argv[2], NULL, 0) * page_size;
        memory_fd = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (memory_fd < 0 || ftruncate(memory_fd, (off_t)length) < 0)
            die(argv[1]);
        memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory_fd,
                      0);
    } else {
        int huge = !strcmp(argv[1], "hugetlb");

        if (huge)
            page_size = 2u << 20;
        length = strtoull(argv[2], NULL, 0) * page_size;
        memory_fd = memfd_create("mapper", MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0));
        if (memory_fd < 0 || ftruncate(memory_fd, (off_t)length) < 0)
            die("memfd");
        memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
    }
    if (memory == MAP_FAILED)
        die("mmap");
    uffd = open_userfaultfd();
    if (uffd < 0)
        die("userfaultfd");
    send_handover(STDIN_FILENO, uffd, (uintptr_t)memory, length, page_size);
    commands = fdopen(STDIN_FILENO, "r");
    while (commands && getline(&line, &room, commands) > 0) {
        pthread_attr_t attributes;
        pthread_t thread;

        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        if (pthread_create(&thread, &attributes, run, strdup(line)))
            die("pthread_create");
    }
    _exit(0); /* with threads that wait for pages */
}
