/*
 * The yardstick: the least a userfaultfd handler can do. One thread reads one fault at a time and
 * copies one chunk from a mapped file, from a blocking or from a spinning read. No ledger, no
 * counters, no events, no errors worth the name.
 *
 *   bare_handler block|spin FILE CHUNK CPU|-1  (the toucher is at the other end of standard input)
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

static void *leave_with_the_toucher(void *unused)
{
    char byte;

    (void)unused;
    while (read(STDIN_FILENO, &byte, 1) > 0)
        ;
    _exit(0);
}

int main(int argc, char **argv)
{
    struct uffdio_api api = { .api = UFFD_API };
    struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };
    struct handover h;
    uint64_t chunk;
    pthread_t watcher;
    const char *source;
    int uffd, file, spin, cpu;

    if (argc != 5)
        die("usage: bare_handler block|spin FILE CHUNK CPU");
    spin = !strcmp(argv[1], "spin");
    chunk = strtoull(argv[3], NULL, 0);
    cpu = atoi(argv[4]);
    uffd = receive_handover(STDIN_FILENO, &h);
    if (ioctl(uffd, UFFDIO_API, &api) < 0)
        die("UFFDIO_API");
    reg.range.start = h.address;
    reg.range.len = h.length;
    if (ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
        die("UFFDIO_REGISTER");
    if (chunk < h.page_size)
        chunk = h.page_size;
    file = open(argv[2], O_RDONLY | O_CLOEXEC);
    source = mmap(NULL, h.length, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
    if (file < 0 || source == MAP_FAILED)
        die("source");
    if (cpu >= 0) {
        cpu_set_t set;

        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        sched_setaffinity(0, sizeof(set), &set);
    }
    fcntl(uffd, F_SETFL, spin ? O_NONBLOCK : 0);
    if (write(STDIN_FILENO, "g", 1) != 1 || pthread_create(&watcher, NULL, leave_with_the_toucher, NULL))
        die("start");
    for (;;) {
        struct uffd_msg message;
        struct uffdio_copy copy = { 0 };
        uint64_t offset;

        if (read(uffd, &message, sizeof(message)) != (ssize_t)sizeof(message))
            continue;
        offset = (message.arg.pagefault.address - h.address) & ~(chunk - 1);
        copy.dst = h.address + offset;
        copy.src = (uintptr_t)source + offset;
        copy.len = chunk < h.length - offset ? chunk : h.length - offset;
        while (ioctl(uffd, UFFDIO_COPY, &copy) < 0) {
            struct uffdio_range range = { copy.dst, copy.len };

            if (copy.copy > 0) {
                copy.dst += (uint64_t)copy.copy;
                copy.src += (uint64_t)copy.copy;
                copy.len -= (uint64_t)copy.copy;
            } else {
                ioctl(uffd, UFFDIO_WAKE, &range);
                break;
            }
        }
    }
}
