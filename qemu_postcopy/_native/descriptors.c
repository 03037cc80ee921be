#define _GNU_SOURCE
#include "descriptors.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define NUMBERS_EVERY 10

static int gone(struct qpc_error *err)
{
    return qpc_error_set(err, QPC_GONE, errno, "the descriptors of a process cannot be listed");
}

static int read_count(int directory, uint64_t *ret)
{
    struct stat status;

    if (fstat(directory, &status))
        return -1;
    *ret = (uint64_t)status.st_size;
    return 0;
}

/* Two sets of numbers have the same sum of these by bad luck only (the end of splitmix64). */
static uint64_t mixed(uint64_t x)
{
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

static int read_numbers(int directory, uint64_t *ret)
{
    char buffer[8192] __attribute__((aligned(8)));
    uint64_t sum = 0;
    ssize_t n;

    if (lseek(directory, 0, SEEK_SET) < 0)
        return -1;
    while ((n = getdents64(directory, buffer, sizeof(buffer))) > 0)
        for (ssize_t at = 0; at < n;) {
            const struct dirent64 *entry = (const struct dirent64 *)(buffer + at);
            uint64_t number = 0;

            at += entry->d_reclen;
            if (entry->d_name[0] < '0' || entry->d_name[0] > '9')
                continue;
            for (const char *c = entry->d_name; *c; c++)
                number = 10 * number + (uint64_t)(*c - '0');
            sum += mixed(number + 1);
        }
    *ret = sum;
    return n < 0 ? -1 : 0;
}

int qpc_descriptors_read(int directory, struct qpc_descriptors *ret, struct qpc_error *err)
{
    return read_count(directory, &ret->count) || read_numbers(directory, &ret->numbers) ? gone(err)
                                                                                        : 0;
}

int qpc_descriptors_wait(int directory, int stop_fd, uint32_t period_us,
                         struct qpc_descriptors *known, struct qpc_error *err)
{
    struct timespec period = { .tv_sec = period_us / 1000000,
                               .tv_nsec = period_us % 1000000 * 1000 };

    for (unsigned round = 1;; round++) {
        struct pollfd stop = { .fd = stop_fd, .events = POLLIN };
        struct qpc_descriptors now = *known;

        if (ppoll(&stop, 1, &period, NULL) > 0)
            return 0;
        if (read_count(directory, &now.count))
            return gone(err);
        if ((now.count != known->count || round % NUMBERS_EVERY == 0 || !now.count) &&
            read_numbers(directory, &now.numbers))
            return gone(err);
        if (now.count != known->count || now.numbers != known->numbers) {
            *known = now;
            return 1;
        }
    }
}
