#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "source.h"

struct file_source {
    struct qpc_source source;
    int fd;
};

/*
 * The size is asked again after the data was read: a file cut short meanwhile shows zeros in the
 * rest of its last page, and what was read while the size still covered it was data.
 */
static int file_read(struct qpc_source *source, uint64_t offset, uint64_t length, void *buffer)
{
    int fd = ((struct file_source *)source)->fd;
    uint64_t done = 0;
    struct stat st;

    while (done < length) {
        ssize_t n = pread(fd, (char *)buffer + done, length - done, (off_t)(offset + done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? errno : ENODATA;
        done += (uint64_t)n;
    }
    if (fstat(fd, &st) < 0)
        return errno;
    if (S_ISREG(st.st_mode) && (uint64_t)st.st_size < offset + length)
        return ENODATA;
    return 0;
}

static void file_close(struct qpc_source *source)
{
    close(((struct file_source *)source)->fd);
    free(source);
}

struct qpc_source *qpc_source_open_file(int fd, struct qpc_error *err)
{
    static const struct qpc_source_operations operations = { file_read, NULL, file_close };
    struct file_source *source;

    if (fd < 0) {
        qpc_error_set(err, QPC_INVALID, 0, "%d is not a descriptor to read page data from", fd);
        return NULL;
    }
    source = malloc(sizeof(*source));
    if (!source) {
        qpc_error_set(err, QPC_SYSTEM, ENOMEM, "no memory for a source");
        return NULL;
    }
    *source = (struct file_source){ { &operations }, fd };
    return &source->source;
}
