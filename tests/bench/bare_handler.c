/*
 * The yardstick: the least a userfaultfd handler can do. One thread for each descriptor reads one
 * fault at a time, from a blocking or from a spinning read, and copies one chunk: from a file that is
 * mapped and in its page tables beforehand, or, as whoever serves more than fits into memory must,
 * from a buffer that it reads the chunk into. No ledger, no counters, no events, no errors worth the
 * name.
 *
 *   bare_handler block|spin mapped|read FILE CHUNK CPU|-1 DESCRIPTORS
 *                                              (the toucher is at the other end of standard input)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "handover.h"

struct handler {
    struct handover part;
    int uffd;
    const char *source; /* mapped: of the part's first byte; NULL: read */
    int file;
    uint64_t file_offset; /* likewise */
    char *buffer;
    uint64_t chunk;
};

static void *leave_with_the_toucher(void *unused)
{
    char byte;

    (void)unused;
    while (read(STDIN_FILENO, &byte, 1) > 0)
        ;
    _exit(0);
}

static void *answer(void *argument)
{
    const struct handler *h = argument;

    for (;;) {
        struct uffd_msg message;
        struct uffdio_copy copy = { 0 };
        uint64_t offset;

        if (read(h->uffd, &message, sizeof(message)) != (ssize_t)sizeof(message))
            continue;
        offset = (message.arg.pagefault.address - h->part.address) & ~(h->chunk - 1);
        copy.dst = h->part.address + offset;
        copy.len = h->chunk < h->part.length - offset ? h->chunk : h->part.length - offset;
        copy.src = (uintptr_t)(h->source ? h->source + offset : h->buffer);
        if (!h->source && pread(h->file, h->buffer, copy.len, (off_t)(h->file_offset + offset)) !=
                              (ssize_t)copy.len)
            die("pread");
        while (ioctl(h->uffd, UFFDIO_COPY, &copy) < 0) {
            struct uffdio_range range = { copy.dst, copy.len };

            if (copy.copy > 0) {
                copy.dst += (uint64_t)copy.copy;
                copy.src += (uint64_t)copy.copy;
                copy.len -= (uint64_t)copy.copy;
            } else {
                ioctl(h->uffd, UFFDIO_WAKE, &range);
                break;
            }
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static struct handler handlers[64];
    uint64_t chunk, length = 0;
    const char *source = NULL;
    int file, spin, mapped, cpu, count;
    pthread_t thread;

    if (argc != 7)
        die("usage: bare_handler block|spin mapped|read FILE CHUNK CPU DESCRIPTORS");
    spin = !strcmp(argv[1], "spin");
    mapped = !strcmp(argv[2], "mapped");
    chunk = strtoull(argv[4], NULL, 0);
    cpu = atoi(argv[5]);
    count = atoi(argv[6]);
    if (count < 1 || count > 64)
        die("descriptors");
    for (int i = 0; i < count; i++) {
        struct uffdio_api api = { .api = UFFD_API };
        struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };
        struct handler *h = &handlers[i];

        h->uffd = receive_handover(STDIN_FILENO, &h->part);
        if (ioctl(h->uffd, UFFDIO_API, &api) < 0)
            die("UFFDIO_API");
        reg.range.start = h->part.address;
        reg.range.len = h->part.length;
        if (ioctl(h->uffd, UFFDIO_REGISTER, &reg) < 0)
            die("UFFDIO_REGISTER");
        h->chunk = chunk < h->part.page_size ? h->part.page_size : chunk;
        length += h->part.length;
        fcntl(h->uffd, F_SETFL, spin ? O_NONBLOCK : 0);
    }
    file = open(argv[3], O_RDONLY | O_CLOEXEC);
    if (mapped)
        source = mmap(NULL, length, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
    if (file < 0 || source == MAP_FAILED)
        die("source");
    if (cpu >= 0) {
        cpu_set_t set;

        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        sched_setaffinity(0, sizeof(set), &set);
    }
    for (int i = 0; i < count; i++) {
        struct handler *h = &handlers[i];

        h->file = file;
        h->file_offset = h->part.address - handlers[0].part.address;
        if (mapped)
            h->source = source + h->file_offset;
        else
            h->buffer = mmap(NULL, h->chunk, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (h->buffer == MAP_FAILED)
            die("buffer");
    }
    if (write(STDIN_FILENO, "g", 1) != 1 ||
        pthread_create(&thread, NULL, leave_with_the_toucher, NULL))
        die("start");
    for (int i = 1; i < count; i++)
        if (pthread_create(&thread, NULL, answer, &handlers[i]))
            die("start");
    answer(&handlers[0]);
}
