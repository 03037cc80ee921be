#define _GNU_SOURCE
#include "page_file.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PART_BYTES (1u << 20)

int qpc_page_is_zero(const void *page, size_t size)
{
    const uint8_t *bytes = page;
    uint64_t first, last;

    /* Most pages with data differ from zero at an end; else compare the page with itself, shifted. */
    memcpy(&first, bytes, 8);
    memcpy(&last, bytes + size - 8, 8);
    return !(first | last) && memcmp(bytes, bytes + 8, size - 8) == 0;
}

uint32_t qpc_page_runs(const void *data, uint64_t size, uint32_t page_size, uint64_t *ret)
{
    const uint8_t *bytes = data;
    uint32_t runs = 0;
    int open = 0;

    for (uint64_t at = 0; at < size; at += page_size) {
        uint64_t length = size - at < page_size ? size - at : page_size;

        if (qpc_page_is_zero(bytes + at, length)) {
            open = 0;
        } else if (open) {
            ret[2 * (runs - 1) + 1] += length;
        } else {
            ret[2 * runs] = at;
            ret[2 * runs + 1] = length;
            runs++;
            open = 1;
        }
    }
    return runs;
}

static int read_exactly(int fd, uint8_t *buffer, uint64_t size, uint64_t offset,
                        struct qpc_error *err)
{
    while (size > 0) {
        ssize_t got = pread(fd, buffer, size, (off_t)offset);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return qpc_error_set(err, QPC_SYSTEM, errno, "cannot read page data at offset %llu",
                                 (unsigned long long)offset);
        if (got == 0)
            return qpc_error_set(err, QPC_FORMAT, 0, "page data ends at offset %llu, too early",
                                 (unsigned long long)offset);
        buffer += got;
        offset += (uint64_t)got;
        size -= (uint64_t)got;
    }
    return 0;
}

/* At offset, or at the descriptor's own position where offset is negative. */
static int write_exactly(int fd, const uint8_t *buffer, uint64_t size, int64_t offset,
                         struct qpc_error *err)
{
    while (size > 0) {
        ssize_t done = offset < 0 ? write(fd, buffer, size) : pwrite(fd, buffer, size, offset);

        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return qpc_error_set(err, QPC_SYSTEM, done ? errno : ENOSPC, "cannot write page data");
        buffer += done;
        if (offset >= 0)
            offset += done;
        size -= (uint64_t)done;
    }
    return 0;
}

int qpc_page_file_punch(int fd, uint64_t offset, uint64_t length, struct qpc_error *err)
{
    static const uint8_t zeros[65536];

    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length) == 0)
        return 0;
    if (errno != EOPNOTSUPP)
        return qpc_error_set(err, QPC_SYSTEM, errno, "cannot punch a hole into page data");
    for (uint64_t at = 0; at < length; at += sizeof(zeros)) {
        uint64_t part = length - at < sizeof(zeros) ? length - at : sizeof(zeros);

        if (write_exactly(fd, zeros, part, (int64_t)(offset + at), err) < 0)
            return -1;
    }
    return 0;
}

int qpc_page_file_next_data(int fd, uint64_t offset, uint64_t end, uint64_t *ret,
                            struct qpc_error *err)
{
    off_t begin = lseek(fd, (off_t)offset, SEEK_DATA);
    off_t hole;

    if (begin < 0 && errno == ENXIO)
        return 0;
    if (begin < 0 && errno == EINVAL) {
        /* lseek(2): the file system does not know SEEK_DATA. */
        ret[0] = offset;
        ret[1] = end;
        return offset < end;
    }
    if (begin < 0)
        return qpc_error_set(err, QPC_SYSTEM, errno, "lseek(SEEK_DATA) on page data failed");
    if ((uint64_t)begin >= end)
        return 0;
    hole = lseek(fd, begin, SEEK_HOLE);
    if (hole < 0)
        return qpc_error_set(err, QPC_SYSTEM, errno, "lseek(SEEK_HOLE) on page data failed");
    ret[0] = (uint64_t)begin;
    ret[1] = (uint64_t)hole < end ? (uint64_t)hole : end;
    return 1;
}

static void set_bits(uint8_t *bitmap, uint64_t first, uint64_t end)
{
    while (first < end && first & 7) {
        bitmap[first / 8] |= (uint8_t)(1u << (first & 7));
        first++;
    }
    memset(bitmap + first / 8, 0xff, (end - first) / 8);
    for (first += (end - first) / 8 * 8; first < end; first++)
        bitmap[first / 8] |= (uint8_t)(1u << (first & 7));
}

int64_t qpc_page_file_bitmap(int fd, uint64_t offset, uint64_t length, uint64_t page_size,
                             uint8_t *bitmap, struct qpc_error *err)
{
    uint64_t pages = length / page_size;
    uint64_t at = offset, reached = 0, count = 0, data[2];
    int more;

    memset(bitmap, 0, (pages + 7) / 8);
    while ((more = qpc_page_file_next_data(fd, at, offset + length, data, err)) > 0) {
        uint64_t first = (data[0] - offset) / page_size;
        uint64_t end = (data[1] - offset + page_size - 1) / page_size;

        end = end < pages ? end : pages;
        set_bits(bitmap, first, end);
        /* A page may have the end of one extent and the begin of the next. */
        first = first > reached ? first : reached;
        if (end > first) {
            count += end - first;
            reached = end;
        }
        at = data[1];
        if (at == offset + length)
            break;
    }
    return more < 0 ? -1 : (int64_t)count;
}

static int is_set(const uint8_t *bitmap, uint64_t page)
{
    return bitmap[page / 8] >> (page & 7) & 1;
}

static int check_cancelled(int cancel_fd, struct qpc_error *err)
{
    struct pollfd wait = { .fd = cancel_fd, .events = POLLIN };

    if (cancel_fd >= 0 && poll(&wait, 1, 0) > 0)
        return qpc_error_set(err, QPC_SYSTEM, ECANCELED, "copying page data was cancelled");
    return 0;
}

/* The bitmap to go by: the caller's, or one made from the file's holes (which the caller frees). */
static int choose_bitmap(int fd, uint64_t offset, uint64_t length, uint32_t page_size,
                         const uint8_t **bitmap, uint8_t **made, struct qpc_error *err)
{
    if (page_size < 8 || page_size > PART_BYTES || length % page_size)
        return qpc_error_set(err, QPC_INVALID, 0, "%u is no possible page size", page_size);
    if (*bitmap)
        return 0;
    *made = malloc(length / page_size / 8 + 1);
    if (!*made)
        return qpc_error_set(err, QPC_SYSTEM, ENOMEM, "no memory for a page bitmap");
    *bitmap = *made;
    return qpc_page_file_bitmap(fd, offset, length, page_size, *made, err) < 0 ? -1 : 0;
}

/* Up to PART_BYTES of neighbouring pages from page on that have their bit set; in pages. */
static uint64_t run_length(const uint8_t *bitmap, uint64_t page, uint64_t pages, uint32_t page_size)
{
    uint64_t most = page + PART_BYTES / page_size;
    uint64_t at = page;

    while (at < pages && at < most && is_set(bitmap, at))
        at++;
    return at - page;
}

static int copy_run(int in_fd, uint64_t in_offset, int out_fd, uint64_t out_offset,
                    uint64_t page, uint64_t length, uint32_t page_size, uint8_t *written,
                    uint8_t *buffer, uint64_t *runs, struct qpc_error *err)
{
    uint64_t at = page * page_size;
    uint32_t count;

    if (read_exactly(in_fd, buffer, length, in_offset + at, err) < 0)
        return -1;
    count = qpc_page_runs(buffer, length, page_size, runs);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t from = runs[2 * i], size = runs[2 * i + 1];
        uint64_t first = (at + from) / page_size;

        if (write_exactly(out_fd, buffer + from, size, (int64_t)(out_offset + at + from), err) < 0)
            return -1;
        if (written)
            set_bits(written, first, first + size / page_size);
    }
    return 0;
}

int qpc_page_file_copy(int in_fd, uint64_t in_offset, const uint8_t *bitmap, uint64_t length,
                       uint32_t page_size, int out_fd, uint64_t out_offset, uint8_t *written,
                       int cancel_fd, struct qpc_error *err)
{
    uint8_t *made = NULL, *buffer = NULL;
    uint64_t *runs = NULL;
    int result = choose_bitmap(in_fd, in_offset, length, page_size, &bitmap, &made, err);

    if (result == 0) {
        buffer = malloc(PART_BYTES);
        runs = malloc((PART_BYTES / page_size + 2) * sizeof(*runs));
        if (!buffer || !runs)
            result = qpc_error_set(err, QPC_SYSTEM, ENOMEM, "no memory for copying page data");
    }
    for (uint64_t page = 0, pages = length / page_size; result == 0 && page < pages;) {
        uint64_t run = run_length(bitmap, page, pages, page_size);

        if (run == 0) {
            page++;
            continue;
        }
        result = check_cancelled(cancel_fd, err);
        if (result == 0)
            result = copy_run(in_fd, in_offset, out_fd, out_offset, page, run * page_size,
                              page_size, written, buffer, runs, err);
        page += run;
    }
    free(runs);
    free(buffer);
    free(made);
    return result;
}

/* Where records are put together before they are written. */
struct record_sink {
    int fd;
    uint8_t *buffer;
    size_t length;
    size_t capacity;
    const char *name; /* not yet written: the first record carries it, the others continue */
};

static int put_page(struct record_sink *sink, uint64_t offset, const uint8_t *data,
                    uint32_t page_size, struct qpc_error *err)
{
    /* QEMU, migration/ram.c: zero 0x02, page 0x08, same block as before 0x20. */
    uint64_t header = __builtin_bswap64(offset | (data ? 0x08 : 0x02) | (sink->name ? 0 : 0x20));
    uint8_t *to;

    if (sink->capacity - sink->length < 8 + 256 + page_size) {
        if (write_exactly(sink->fd, sink->buffer, sink->length, -1, err) < 0)
            return -1;
        sink->length = 0;
    }
    to = sink->buffer + sink->length;
    memcpy(to, &header, 8);
    to += 8;
    if (sink->name) {
        *to = (uint8_t)strlen(sink->name);
        memcpy(to + 1, sink->name, *to);
        to += 1 + *to;
        sink->name = NULL;
    }
    if (data) {
        memcpy(to, data, page_size);
        to += page_size;
    } else {
        *to++ = 0;
    }
    sink->length = (size_t)(to - sink->buffer);
    return 0;
}

static int put_pages(struct record_sink *sink, int in_fd, uint64_t in_offset,
                     const uint8_t *bitmap, uint64_t length, uint32_t page_size,
                     uint8_t *buffer, int cancel_fd, struct qpc_error *err)
{
    uint64_t pages = length / page_size;

    for (uint64_t page = 0; page < pages;) {
        uint64_t run = run_length(bitmap, page, pages, page_size);

        if (run == 0) {
            if (put_page(sink, page * page_size, NULL, page_size, err) < 0)
                return -1;
            page++;
            continue;
        }
        if (check_cancelled(cancel_fd, err) < 0 ||
            read_exactly(in_fd, buffer, run * page_size, in_offset + page * page_size, err) < 0)
            return -1;
        for (uint64_t i = 0; i < run; i++) {
            const uint8_t *data = buffer + i * page_size;

            if (put_page(sink, (page + i) * page_size,
                         qpc_page_is_zero(data, page_size) ? NULL : data, page_size, err) < 0)
                return -1;
        }
        page += run;
    }
    return write_exactly(sink->fd, sink->buffer, sink->length, -1, err);
}

int qpc_page_file_write_records(int in_fd, uint64_t in_offset, const uint8_t *bitmap,
                                uint64_t length, uint32_t page_size, const char *name, int out_fd,
                                int cancel_fd, struct qpc_error *err)
{
    struct record_sink sink = { .fd = out_fd, .capacity = PART_BYTES, .name = name };
    uint8_t *made = NULL, *buffer = NULL;
    int result;

    if (strlen(name) == 0 || strlen(name) > 255)
        return qpc_error_set(err, QPC_INVALID, 0, "\"%.64s\" is no possible block name", name);
    result = choose_bitmap(in_fd, in_offset, length, page_size, &bitmap, &made, err);
    if (result == 0) {
        buffer = malloc(PART_BYTES);
        sink.buffer = malloc(PART_BYTES);
        if (!buffer || !sink.buffer)
            result = qpc_error_set(err, QPC_SYSTEM, ENOMEM, "no memory for copying page data");
    }
    if (result == 0)
        result = put_pages(&sink, in_fd, in_offset, bitmap, length, page_size, buffer, cancel_fd,
                           err);
    free(sink.buffer);
    free(buffer);
    free(made);
    return result;
}
