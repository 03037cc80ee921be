#define _GNU_SOURCE
#include "stream.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include "page_file.h"
#include "stream_records.h"

#define BUFFER_BYTES (1u << 20)
#define PEEK_BYTES_MAX 1024u
/* Read at first after a seek: who goes over a file by seeks wants little at each place. */
#define SEEK_READ_BYTES 4096u
#define PIPE_BYTES (1 << 20)
#define IOVECS_MAX 1024u
#define RECORDS_BYTES (256u << 10)

struct block {
    char name[QPC_NAME_BYTES_MAX + 1];
    uint64_t length;
    int page_fd;
    uint64_t page_offset;
    uint8_t *written; /* one bit per page; NULL for eager blocks */
    struct qpc_stream_counts counts;
};

/* A run of neighbouring pages not yet brought to its page file. */
struct pending {
    struct block *block; /* NULL: nothing is pending */
    int punch;           /* a hole to punch, else data in iovecs */
    uint64_t offset;     /* in the block */
    uint64_t length;
    uint32_t iovec_count;
    struct iovec iovecs[IOVECS_MAX]; /* point into the stream's buffer */
};

struct qpc_stream {
    int fd;
    int cancel_fd;
    uint8_t *buffer;
    size_t begin; /* unread bytes of buffer */
    size_t end;
    uint64_t end_offset; /* in the stream, of buffer + end */
    size_t read_limit;   /* of the next read; doubled by each */
    uint32_t page_size;
    struct block *blocks[QPC_BLOCKS_MAX];
    uint32_t block_count;
    struct block *current; /* what CONTINUE means; outlives a section, as in QEMU */
    struct pending pending;
    int records_fd;
    uint8_t *records;
    size_t records_length;
    _Atomic uint64_t bytes;
    _Atomic uint64_t pages_data;
    _Atomic uint64_t pages_zero;
};

/* Written by one thread only, so a load and a store are enough. */
static void count_up(_Atomic uint64_t *counter)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1,
                          memory_order_relaxed);
}

static uint64_t load_be64(const uint8_t *bytes)
{
    uint64_t value;

    memcpy(&value, bytes, sizeof(value));
    return __builtin_bswap64(value);
}

struct qpc_stream *qpc_stream_create(int fd, uint64_t offset, struct qpc_error *err)
{
    struct qpc_stream *stream = calloc(1, sizeof(*stream));

    if (stream) {
        stream->cancel_fd = -1;
        stream->buffer = malloc(BUFFER_BYTES);
        stream->records = malloc(RECORDS_BYTES);
    }
    if (!stream || !stream->buffer || !stream->records) {
        qpc_stream_destroy(stream);
        qpc_error_set(err, QPC_SYSTEM, ENOMEM, "no memory for reading a migration stream");
        return NULL;
    }
    stream->fd = fd;
    stream->end_offset = offset;
    stream->read_limit = BUFFER_BYTES;
    atomic_store_explicit(&stream->bytes, offset, memory_order_relaxed);
    stream->cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (stream->cancel_fd < 0) {
        qpc_error_set(err, QPC_SYSTEM, errno, "eventfd failed");
        qpc_stream_destroy(stream);
        return NULL;
    }
    /* Fails where fd is no pipe or the user has too much in pipes: then it stays as it is. */
    (void)fcntl(fd, F_SETPIPE_SZ, PIPE_BYTES);
    return stream;
}

void qpc_stream_destroy(struct qpc_stream *stream)
{
    if (!stream)
        return;
    for (uint32_t i = 0; i < stream->block_count; i++) {
        free(stream->blocks[i]->written);
        free(stream->blocks[i]);
    }
    if (stream->cancel_fd >= 0)
        close(stream->cancel_fd);
    free(stream->records);
    free(stream->buffer);
    free(stream);
}

void qpc_stream_cancel(struct qpc_stream *stream)
{
    uint64_t one = 1;

    /* Never read, so it stays readable; a full counter (EAGAIN) is readable too. */
    (void)!write(stream->cancel_fd, &one, sizeof(one));
}

int qpc_stream_cancel_fd(const struct qpc_stream *stream)
{
    return stream->cancel_fd;
}

uint64_t qpc_stream_offset(const struct qpc_stream *stream)
{
    return stream->end_offset - (stream->end - stream->begin);
}

static void publish_offset(struct qpc_stream *stream)
{
    atomic_store_explicit(&stream->bytes, qpc_stream_offset(stream), memory_order_relaxed);
}

void qpc_stream_read_progress(const struct qpc_stream *stream, struct qpc_stream_progress *ret)
{
    ret->bytes = atomic_load_explicit(&stream->bytes, memory_order_relaxed);
    ret->pages_data = atomic_load_explicit(&stream->pages_data, memory_order_relaxed);
    ret->pages_zero = atomic_load_explicit(&stream->pages_zero, memory_order_relaxed);
}

/* Waits for input or for the cancellation; reads once. Returns the bytes read, 0 at the end. */
static ssize_t read_some(struct qpc_stream *stream, void *buffer, size_t size,
                         struct qpc_error *err)
{
    struct pollfd waits[2] = {
        { .fd = stream->fd, .events = POLLIN },
        { .fd = stream->cancel_fd, .events = POLLIN },
    };

    for (;;) {
        ssize_t got;

        if (poll(waits, 2, -1) < 0 && errno != EINTR)
            return qpc_error_set(err, QPC_SYSTEM, errno, "poll on the migration stream failed");
        if (waits[1].revents)
            return qpc_error_set(err, QPC_SYSTEM, ECANCELED,
                                 "reading the migration stream was cancelled");
        if (!waits[0].revents)
            continue;
        got = read(stream->fd, buffer, size);
        if (got >= 0)
            return got;
        if (errno != EINTR && errno != EAGAIN)
            return qpc_error_set(err, QPC_SYSTEM, errno,
                                 "cannot read the migration stream at offset %llu",
                                 (unsigned long long)stream->end_offset);
    }
}

static int write_failed(const struct block *block, struct qpc_error *err)
{
    return qpc_error_set(err, QPC_SYSTEM, errno, "cannot write page data of RAM block %.64s",
                         block->name);
}

static int write_pending(struct qpc_stream *stream, struct qpc_error *err)
{
    struct pending *pending = &stream->pending;
    struct block *block = pending->block;
    struct iovec *iovec = pending->iovecs;
    uint32_t left = pending->iovec_count;
    uint64_t position;

    if (!block)
        return 0;
    pending->block = NULL;
    position = block->page_offset + pending->offset;
    if (pending->punch)
        return qpc_page_file_punch(block->page_fd, position, pending->length, err);
    while (left > 0) {
        ssize_t done = pwritev(block->page_fd, iovec, (int)left, (off_t)position);

        if (done < 0 && errno == EINTR)
            continue;
        if (done == 0)
            errno = ENOSPC;
        if (done <= 0)
            return write_failed(block, err);
        position += (uint64_t)done;
        while (left > 0 && (size_t)done >= iovec->iov_len) {
            done -= (ssize_t)iovec->iov_len;
            iovec++;
            left--;
        }
        if (left > 0) {
            iovec->iov_base = (uint8_t *)iovec->iov_base + done;
            iovec->iov_len -= (size_t)done;
        }
    }
    return 0;
}

/*
 * Makes size (at most BUFFER_BYTES) unread bytes available; returns how many there are, fewer only
 * at the end of the stream. What is pending is written first, as it points into the buffer.
 */
static ssize_t fill(struct qpc_stream *stream, size_t size, struct qpc_error *err)
{
    size_t unread = stream->end - stream->begin;

    if (unread >= size)
        return (ssize_t)unread;
    publish_offset(stream);
    if (write_pending(stream, err) < 0)
        return -1;
    memmove(stream->buffer, stream->buffer + stream->begin, unread);
    stream->begin = 0;
    stream->end = unread;
    while (stream->end < size) {
        size_t room = BUFFER_BYTES - stream->end;
        ssize_t got = read_some(stream, stream->buffer + stream->end,
                                room < stream->read_limit ? room : stream->read_limit, err);

        if (stream->read_limit < BUFFER_BYTES)
            stream->read_limit *= 2;
        if (got < 0)
            return -1;
        if (got == 0)
            break;
        stream->end += (size_t)got;
        stream->end_offset += (uint64_t)got;
    }
    return (ssize_t)stream->end;
}

static int truncated(const struct qpc_stream *stream, struct qpc_error *err)
{
    return qpc_error_set(err, QPC_FORMAT, 0,
                         "the migration stream ends at offset %llu in the middle of a record",
                         (unsigned long long)stream->end_offset);
}

/* Like fill(), and fewer bytes are an error. */
static inline int need(struct qpc_stream *stream, size_t size, struct qpc_error *err)
{
    ssize_t available;

    if (stream->end - stream->begin >= size)
        return 0;
    available = fill(stream, size, err);
    if (available < 0)
        return -1;
    return (size_t)available < size ? truncated(stream, err) : 0;
}

int qpc_stream_read(struct qpc_stream *stream, void *buffer, uint64_t size, struct qpc_error *err)
{
    uint8_t *to = buffer;

    while (size > 0) {
        size_t part = size < BUFFER_BYTES ? size : BUFFER_BYTES;

        if (need(stream, part, err) < 0)
            return -1;
        memcpy(to, stream->buffer + stream->begin, part);
        stream->begin += part;
        to += part;
        size -= part;
    }
    publish_offset(stream);
    return 0;
}

int qpc_stream_peek(struct qpc_stream *stream, void *buffer, uint32_t size, struct qpc_error *err)
{
    ssize_t available;

    if (size > PEEK_BYTES_MAX)
        return qpc_error_set(err, QPC_INVALID, 0, "cannot peek at %u bytes", size);
    available = fill(stream, size, err);
    if (available < 0)
        return -1;
    if ((size_t)available < size)
        size = (uint32_t)available;
    memcpy(buffer, stream->buffer + stream->begin, size);
    return (int)size;
}

int qpc_stream_seek(struct qpc_stream *stream, uint64_t offset, struct qpc_error *err)
{
    uint64_t now = qpc_stream_offset(stream);

    if (write_pending(stream, err) < 0)
        return -1;
    if (offset >= now && offset <= stream->end_offset) {
        stream->begin += offset - now;
    } else {
        if (offset > INT64_MAX || lseek(stream->fd, (off_t)offset, SEEK_SET) < 0)
            return qpc_error_set(err, QPC_SYSTEM, offset > INT64_MAX ? EOVERFLOW : errno,
                                 "cannot go to offset %llu of the migration stream",
                                 (unsigned long long)offset);
        stream->begin = stream->end = 0;
        stream->end_offset = offset;
        stream->read_limit = SEEK_READ_BYTES;
    }
    publish_offset(stream);
    return 0;
}

static int write_all(int fd, const uint8_t *bytes, size_t size, struct qpc_error *err)
{
    while (size > 0) {
        ssize_t done = write(fd, bytes, size);

        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return qpc_error_set(err, QPC_SYSTEM, done ? errno : ENOSPC,
                                 "cannot write the device state file");
        bytes += done;
        size -= (size_t)done;
    }
    return 0;
}

int qpc_stream_copy_rest(struct qpc_stream *stream, int out_fd, struct qpc_error *err)
{
    for (;;) {
        ssize_t available = fill(stream, 1, err);

        if (available <= 0)
            return (int)available;
        if (write_all(out_fd, stream->buffer + stream->begin, (size_t)available, err) < 0)
            return -1;
        stream->begin = stream->end;
        publish_offset(stream);
    }
}

int qpc_stream_add_block(struct qpc_stream *stream, const char *name, uint64_t length,
                         uint32_t page_size, int page_fd, uint64_t page_offset,
                         struct qpc_error *err)
{
    size_t name_length = strlen(name);
    struct block *block;

    if (stream->block_count > 0 && page_size != stream->page_size)
        return qpc_error_set(err, QPC_INVALID, 0, "%u bytes is no possible target page size",
                             page_size);
    if (qpc_record_check_block(name, length, page_size, err) < 0)
        return -1;
    if (stream->block_count == QPC_BLOCKS_MAX)
        return qpc_error_set(err, QPC_FORMAT, 0, "more than %u RAM blocks", QPC_BLOCKS_MAX);
    block = calloc(1, sizeof(*block));
    if (block && page_fd >= 0) {
        block->written = calloc((length / page_size + 7) / 8 + 1, 1);
        if (!block->written) {
            free(block);
            block = NULL;
        }
    }
    if (!block)
        return qpc_error_set(err, QPC_SYSTEM, ENOMEM, "no memory for RAM block %.64s", name);
    memcpy(block->name, name, name_length);
    block->length = length;
    block->page_fd = page_fd;
    block->page_offset = page_offset;
    stream->page_size = page_size;
    stream->blocks[stream->block_count] = block;
    return (int)stream->block_count++;
}

int qpc_stream_read_counts(const struct qpc_stream *stream, uint32_t block,
                           struct qpc_stream_counts *ret, struct qpc_error *err)
{
    if (block >= stream->block_count)
        return qpc_error_set(err, QPC_INVALID, 0, "there is no block %u", block);
    *ret = stream->blocks[block]->counts;
    return 0;
}

const uint8_t *qpc_stream_written_bitmap(const struct qpc_stream *stream, uint32_t block)
{
    return block < stream->block_count ? stream->blocks[block]->written : NULL;
}

static int flush_records(struct qpc_stream *stream, struct qpc_error *err)
{
    size_t length = stream->records_length;

    stream->records_length = 0;
    return write_all(stream->records_fd, stream->records, length, err);
}

/* One record of an eager block, with the block's name spelt out. */
static int put_record(struct qpc_stream *stream, const struct block *block, uint64_t offset,
                      uint32_t flag, const uint8_t *payload, size_t payload_length,
                      struct qpc_error *err)
{
    uint64_t header = __builtin_bswap64(offset | flag);
    size_t name_length = strlen(block->name);
    uint8_t *to;

    if (stream->records_fd < 0)
        return 0;
    if (stream->records_length + 9 + name_length + payload_length > RECORDS_BYTES &&
        flush_records(stream, err) < 0)
        return -1;
    to = stream->records + stream->records_length;
    memcpy(to, &header, 8);
    to[8] = (uint8_t)name_length;
    memcpy(to + 9, block->name, name_length);
    memcpy(to + 9 + name_length, payload, payload_length);
    stream->records_length += 9 + name_length + payload_length;
    return 0;
}

/* Adds a page of a lazy block to what is pending. */
static int defer_page(struct qpc_stream *stream, struct block *block, uint64_t offset,
                      uint8_t *data, struct qpc_error *err)
{
    struct pending *pending = &stream->pending;
    int punch = data == NULL;

    if (pending->block &&
        (pending->block != block || pending->punch != punch ||
         pending->offset + pending->length != offset || pending->iovec_count == IOVECS_MAX) &&
        write_pending(stream, err) < 0)
        return -1;
    if (!pending->block) {
        pending->block = block;
        pending->punch = punch;
        pending->offset = offset;
        pending->length = 0;
        pending->iovec_count = 0;
    }
    if (!punch) {
        pending->iovecs[pending->iovec_count].iov_base = data;
        pending->iovecs[pending->iovec_count].iov_len = stream->page_size;
        pending->iovec_count++;
    }
    pending->length += stream->page_size;
    return 0;
}

static int take_zero_page(struct qpc_stream *stream, struct block *block, uint64_t offset,
                          struct qpc_error *err)
{
    uint64_t page = offset / stream->page_size;
    uint8_t bit = (uint8_t)(1u << (page & 7));

    block->counts.pages_zero++;
    count_up(&stream->pages_zero);
    if (!block->written)
        return put_record(stream, block, offset, QPC_RECORD_ZERO, (const uint8_t *)"", 1, err);
    if (!(block->written[page / 8] & bit))
        return 0;
    block->written[page / 8] &= (uint8_t)~bit;
    block->counts.pages_written--;
    return defer_page(stream, block, offset, NULL, err);
}

static int take_data_page(struct qpc_stream *stream, struct block *block, uint64_t offset,
                          uint8_t *data, struct qpc_error *err)
{
    uint64_t page = offset / stream->page_size;
    uint8_t bit = (uint8_t)(1u << (page & 7));

    if (qpc_page_is_zero(data, stream->page_size))
        return take_zero_page(stream, block, offset, err);
    block->counts.pages_data++;
    count_up(&stream->pages_data);
    if (!block->written)
        return put_record(stream, block, offset, QPC_RECORD_PAGE, data, stream->page_size, err);
    if (!(block->written[page / 8] & bit)) {
        block->written[page / 8] |= bit;
        block->counts.pages_written++;
    }
    return defer_page(stream, block, offset, data, err);
}

/* The block of a record: the last one, or the one whose name stands next in the stream. */
static struct block *take_block(struct qpc_stream *stream, uint32_t flags, uint64_t at,
                                struct qpc_error *err)
{
    const uint8_t *name;
    size_t length;

    if (flags & QPC_RECORD_CONTINUE) {
        if (!stream->current)
            qpc_error_set(err, QPC_FORMAT, 0,
                          "RAM record at offset %llu continues a block, but none was named",
                          (unsigned long long)at);
        return stream->current;
    }
    if (need(stream, 1, err) < 0)
        return NULL;
    length = stream->buffer[stream->begin];
    if (need(stream, 1 + length, err) < 0)
        return NULL;
    name = stream->buffer + stream->begin + 1;
    stream->begin += 1 + length;
    for (uint32_t i = 0; i < stream->block_count; i++) {
        struct block *block = stream->blocks[i];

        if (strlen(block->name) == length && memcmp(block->name, name, length) == 0)
            return stream->current = block;
    }
    qpc_error_set(err, QPC_FORMAT, 0,
                  "RAM record at offset %llu names the block \"%.*s\", which was not announced",
                  (unsigned long long)at, (int)(length < 64 ? length : 64), (const char *)name);
    return NULL;
}

static int take_records(struct qpc_stream *stream, struct qpc_error *err)
{
    uint32_t page_size = stream->page_size;

    for (;;) {
        struct block *block;
        uint64_t at, offset;
        uint32_t flags;
        uint8_t *payload;

        if (need(stream, 8, err) < 0)
            return -1;
        at = qpc_stream_offset(stream);
        offset = load_be64(stream->buffer + stream->begin);
        stream->begin += 8;
        flags = (uint32_t)offset & (page_size - 1);
        offset -= flags;
        if (qpc_record_check_flags(flags, at, err) < 0)
            return -1;
        if (flags == QPC_RECORD_EOS) {
            if (offset)
                return qpc_error_set(err, QPC_FORMAT, 0,
                                     "the end mark at offset %llu carries a page offset",
                                     (unsigned long long)at);
            return 0;
        }
        block = take_block(stream, flags, at, err);
        if (!block)
            return -1;
        if (offset >= block->length)
            return qpc_error_set(err, QPC_FORMAT, 0,
                                 "RAM record at offset %llu: page at %#llx is outside of block "
                                 "%.64s of %#llx bytes",
                                 (unsigned long long)at, (unsigned long long)offset, block->name,
                                 (unsigned long long)block->length);
        if (need(stream, flags & QPC_RECORD_ZERO ? 1 : page_size, err) < 0)
            return -1;
        payload = stream->buffer + stream->begin;
        if (flags & QPC_RECORD_ZERO) {
            stream->begin += 1;
            if (*payload)
                return qpc_error_set(err, QPC_FORMAT, 0,
                                     "the zero page at offset %llu is filled with %#x",
                                     (unsigned long long)at, *payload);
            if (take_zero_page(stream, block, offset, err) < 0)
                return -1;
        } else {
            stream->begin += page_size;
            if (take_data_page(stream, block, offset, payload, err) < 0)
                return -1;
        }
    }
}

int qpc_stream_ram_section(struct qpc_stream *stream, int records_fd, struct qpc_error *err)
{
    int result;

    if (stream->block_count == 0)
        return qpc_error_set(err, QPC_INVALID, 0, "no RAM block was announced");
    stream->records_fd = records_fd;
    stream->records_length = 0;
    result = take_records(stream, err);
    if (result == 0)
        result = write_pending(stream, err);
    if (result == 0 && records_fd >= 0)
        result = flush_records(stream, err);
    stream->pending.block = NULL;
    publish_offset(stream);
    return result;
}
