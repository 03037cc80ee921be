#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "source.h"

struct file_source {
    struct qpc_source source;
    int fd;
    int has_size; /* a regular file */
};

static int read_all(int fd, uint64_t offset, uint64_t length, char *buffer)
{
    while (length) {
        ssize_t n = pread(fd, buffer, length, (off_t)offset);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? errno : ENODATA;
        offset += (uint64_t)n;
        length -= (uint64_t)n;
        buffer += n;
    }
    return 0;
}

/*
 * The size is asked again after the data was read: a file cut short meanwhile shows zeros in the
 * rest of its last page, and what was read while the size still covered it was data. lseek(2) tells
 * it for half of what fstat(2) costs; nobody uses the descriptor's own offset.
 */
static void file_read_parts(struct qpc_source *source, struct qpc_source_part *parts,
                            uint32_t count)
{
    const struct file_source *file = (struct file_source *)source;
    uint64_t size = UINT64_MAX;
    int errnum = 0;

    for (uint32_t i = 0; i < count; i++)
        parts[i].errnum = read_all(file->fd, parts[i].offset, parts[i].length, parts[i].buffer);
    if (file->has_size) {
        off_t end = lseek(file->fd, 0, SEEK_END);

        size = (uint64_t)end;
        errnum = end < 0 ? errno : 0;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (!parts[i].errnum && size < parts[i].offset + parts[i].length)
            parts[i].errnum = ENODATA;
        if (errnum)
            parts[i].errnum = errnum;
    }
}

static int file_read(struct qpc_source *source, uint64_t offset, uint64_t length, void *buffer)
{
    struct qpc_source_part part = { offset, length, buffer, 0 };

    file_read_parts(source, &part, 1);
    return part.errnum;
}

static void file_close(struct qpc_source *source)
{
    close(((struct file_source *)source)->fd);
    free(source);
}

struct qpc_source *qpc_source_open_file(int fd, struct qpc_error *err)
{
    static const struct qpc_source_operations operations = {
        file_read, file_read_parts, NULL, file_close
    };
    struct file_source *source;
    struct stat st;

    if (fd < 0 || fstat(fd, &st) < 0) {
        qpc_error_set(err, QPC_INVALID, 0, "%d is not a descriptor to read page data from", fd);
        return NULL;
    }
    source = malloc(sizeof(*source));
    if (!source) {
        qpc_error_set(err, QPC_SYSTEM, ENOMEM, "no memory for a source");
        return NULL;
    }
    *source = (struct file_source){ { &operations }, fd, S_ISREG(st.st_mode) };
    return &source->source;
}
