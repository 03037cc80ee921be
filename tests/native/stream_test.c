/*
 * The stream reader and the page files without Python, for sanitizers: good, cut, altered and
 * random streams. Prints the name of each check; exits with 1 at the first that fails.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "page_file.h"
#include "stream.h"

#define PAGE 4096u
#define PAGES 64u
#define REQUIRE(what)                                                                              \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            fprintf(stderr, "%s:%d: %s\n", __func__, __LINE__, #what);                            \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static uint8_t bytes[8u << 20];
static size_t length;

static void put(const void *data, size_t size)
{
    REQUIRE(length + size <= sizeof(bytes));
    memcpy(bytes + length, data, size);
    length += size;
}

static void put_header(uint64_t value)
{
    value = __builtin_bswap64(value);
    put(&value, 8);
}

static void put_name(const char *name)
{
    uint8_t size = (uint8_t)strlen(name);

    put(&size, 1);
    put(name, size);
}

/* fill 0: a page of zeros sent as data. */
static void put_page(uint64_t page, const char *name, uint8_t fill)
{
    uint8_t data[PAGE];

    memset(data, fill, sizeof(data));
    put_header(page * PAGE | 0x08 | (name ? 0 : 0x20));
    if (name)
        put_name(name);
    put(data, sizeof(data));
}

static void put_zero(uint64_t page, const char *name, uint8_t fill)
{
    put_header(page * PAGE | 0x02 | (name ? 0 : 0x20));
    if (name)
        put_name(name);
    put(&fill, 1);
}

static int memory_file(const void *data, size_t size, size_t file_size)
{
    int fd = memfd_create("test", MFD_CLOEXEC);

    REQUIRE(fd >= 0 && ftruncate(fd, (off_t)file_size) == 0);
    REQUIRE(pwrite(fd, data, size, 0) == (ssize_t)size);
    return fd;
}

/* Feeds bytes[0..length) through a reader with a lazy block "m0" and an eager block "rom". */
static int feed(int page_fd, int records_fd, uint64_t *written, struct qpc_error *err)
{
    int in = memory_file(bytes, length, length);
    struct qpc_stream *stream = qpc_stream_create(in, 0, err);
    struct qpc_stream_counts counts;
    int result;

    REQUIRE(stream);
    REQUIRE(qpc_stream_add_block(stream, "m0", PAGES * PAGE, PAGE, page_fd, 0, err) == 0);
    REQUIRE(qpc_stream_add_block(stream, "rom", 4 * PAGE, PAGE, -1, 0, err) == 1);
    result = qpc_stream_ram_section(stream, records_fd, err);
    if (result == 0) {
        REQUIRE(qpc_stream_offset(stream) <= length);
        REQUIRE(qpc_stream_read_counts(stream, 0, &counts, err) == 0);
        if (written)
            *written = counts.pages_written;
    }
    qpc_stream_destroy(stream);
    close(in);
    return result;
}

static uint8_t first_byte(int fd, uint64_t page)
{
    uint8_t value = 0xee;

    REQUIRE(pread(fd, &value, 1, (off_t)(page * PAGE)) == 1);
    return value;
}

static int is_hole(int fd, uint64_t page)
{
    return lseek(fd, (off_t)(page * PAGE), SEEK_DATA) != (off_t)(page * PAGE);
}

static void pages_reach_their_files(void)
{
    int pages = memory_file("", 0, PAGES * PAGE);
    int records = memory_file("", 0, 0);
    struct qpc_error err = { 0 };
    uint8_t head[13];
    uint64_t written;

    length = 0;
    put_page(0, "m0", 1);
    put_page(1, NULL, 2);
    put_page(PAGES - 1, NULL, 3);
    put_page(7, NULL, 4);
    put_page(7, NULL, 5);  /* the later wins */
    put_page(8, NULL, 6);
    put_zero(8, NULL, 0);  /* was written: becomes a hole again */
    put_page(9, NULL, 7);
    put_page(9, NULL, 0);  /* the same, sent as data */
    put_page(10, NULL, 0); /* never was anything but a hole */
    for (uint32_t page = 20; page < 24; page++)
        put_page(page, NULL, 9);
    put_page(20, NULL, 10); /* data, hole, data in neighbouring pages */
    put_zero(21, NULL, 0);
    put_zero(22, NULL, 0);
    put_page(23, NULL, 11);
    put_page(3, "rom", 8);
    put_zero(2, NULL, 0);
    put_header(0x10);
    REQUIRE(feed(pages, records, &written, &err) == 0);
    REQUIRE(written == 6);
    REQUIRE(first_byte(pages, 20) == 10 && first_byte(pages, 23) == 11);
    REQUIRE(is_hole(pages, 21) && is_hole(pages, 22));
    REQUIRE(first_byte(pages, 0) == 1 && first_byte(pages, 1) == 2);
    REQUIRE(first_byte(pages, PAGES - 1) == 3 && first_byte(pages, 7) == 5);
    REQUIRE(is_hole(pages, 8) && is_hole(pages, 9) && is_hole(pages, 10));
    REQUIRE(lseek(records, 0, SEEK_END) == 8 + 4 + PAGE + 8 + 4 + 1);
    REQUIRE(pread(records, head, 13, 0) == 13);
    REQUIRE(memcmp(head, "\0\0\0\0\0\0\x30\x08\x03rom\x08", 13) == 0);
    close(pages);
    close(records);
}

static void a_stream_cut_anywhere_is_an_error(void)
{
    struct qpc_error err = { 0 };
    size_t whole;

    length = 0;
    put_page(0, "m0", 1);
    put_zero(1, "rom", 0);
    put_header(0x10);
    whole = length;
    for (length = 0; length < whole; length++) {
        int pages = memory_file("", 0, PAGES * PAGE);

        REQUIRE(feed(pages, -1, NULL, &err) < 0 && err.code == QPC_FORMAT);
        close(pages);
    }
}

static void malformed_records_are_refused(void)
{
    static const uint64_t headers[] = {
        0x00, 0x01, 0x0a, 0x04, 0x18, 0x12, 0x20, 0x30, 0x40 | 8, 0x80, 0x100, 0x200, 0x210,
        0x400, 0x800, 0x28, 0x22, PAGE | 0x10, ~0ull, PAGES * PAGE | 8, (1ull << 63) | 8,
        (~0ull & ~0xfffull) | 2,
    };
    struct qpc_error err = { 0 };
    int pages = memory_file("", 0, PAGES * PAGE);

    for (size_t i = 0; i < sizeof(headers) / sizeof(headers[0]); i++) {
        length = 0;
        put_header(headers[i]);
        put_name("m0");
        memset(bytes + length, 0, PAGE);
        length += PAGE;
        REQUIRE(feed(pages, -1, NULL, &err) < 0 && err.code == QPC_FORMAT);
        REQUIRE(strstr(err.message, "offset 0"));
    }
    length = 0;
    put_page(0, "unknown", 1);
    REQUIRE(feed(pages, -1, NULL, &err) < 0 && strstr(err.message, "unknown"));
    length = 0;
    put_page(0, "", 1);
    REQUIRE(feed(pages, -1, NULL, &err) < 0 && err.code == QPC_FORMAT);
    length = 0;
    put_zero(0, "m0", 5);
    REQUIRE(feed(pages, -1, NULL, &err) < 0 && strstr(err.message, "filled"));
    close(pages);
}

static void random_changes_do_no_harm(void)
{
    static uint8_t good[sizeof(bytes)];
    struct qpc_error err;
    size_t whole;
    uint32_t accepted = 0;

    srandom(7);
    length = 0;
    for (uint32_t page = 0; page < 12; page++)
        page % 3 ? put_page(page, page % 2 ? "m0" : NULL, (uint8_t)page) : put_zero(page, "m0", 0);
    put_page(1, "rom", 9);
    put_header(0x10);
    whole = length;
    memcpy(good, bytes, whole);
    for (int round = 0; round < 3000; round++) {
        int pages = memory_file("", 0, PAGES * PAGE);
        int records = memory_file("", 0, 0);

        memcpy(bytes, good, whole);
        length = whole;
        for (int change = 0; change <= round % 3; change++)
            bytes[random() % 4 ? (size_t)(random() % 12) * (PAGE / 2) % whole
                               : (size_t)random() % whole] = (uint8_t)random();
        if (feed(pages, records, NULL, &err) == 0)
            accepted++;
        else
            REQUIRE(err.code == QPC_FORMAT);
        REQUIRE(lseek(pages, 0, SEEK_END) == PAGES * PAGE);
        close(pages);
        close(records);
    }
    REQUIRE(accepted > 0);
}

static void impossible_blocks_are_refused(void)
{
    struct qpc_error err = { 0 };
    struct qpc_stream *stream = qpc_stream_create(0, 0, &err);
    char name[300];

    memset(name, 'x', sizeof(name) - 1);
    name[sizeof(name) - 1] = 0;
    REQUIRE(stream);
    REQUIRE(qpc_stream_ram_section(stream, -1, &err) < 0 && err.code == QPC_INVALID);
    REQUIRE(qpc_stream_add_block(stream, "", PAGE, PAGE, -1, 0, &err) < 0);
    REQUIRE(qpc_stream_add_block(stream, name, PAGE, PAGE, -1, 0, &err) < 0);
    REQUIRE(qpc_stream_add_block(stream, "a", ~0ull, PAGE, -1, 0, &err) < 0);
    REQUIRE(qpc_stream_add_block(stream, "a", PAGE + 1, PAGE, -1, 0, &err) < 0);
    REQUIRE(qpc_stream_add_block(stream, "a", PAGE, 3000, -1, 0, &err) < 0);
    REQUIRE(qpc_stream_add_block(stream, "a", PAGE, PAGE, -1, 0, &err) == 0);
    REQUIRE(qpc_stream_add_block(stream, "b", 16384, 16384, -1, 0, &err) < 0);
    REQUIRE(!qpc_stream_written_bitmap(stream, 0) && !qpc_stream_written_bitmap(stream, 9));
    qpc_stream_destroy(stream);
    qpc_stream_destroy(NULL);
}

static void a_full_disk_is_reported(void)
{
    struct qpc_error err = { 0 };
    int full = open("/dev/full", O_RDWR);
    int pages = memory_file("", 0, PAGES * PAGE);

    length = 0;
    put_page(0, "m0", 1);
    put_header(0x10);
    REQUIRE(feed(full, -1, NULL, &err) < 0);
    REQUIRE(err.code == QPC_SYSTEM && err.errnum == ENOSPC);
    length = 0;
    put_page(0, "rom", 1);
    put_header(0x10);
    REQUIRE(feed(pages, full, NULL, &err) < 0);
    REQUIRE(err.code == QPC_SYSTEM && err.errnum == ENOSPC);
    close(full);
    close(pages);
}

static void *write_slowly(void *argument)
{
    int fd = *(int *)argument;
    size_t at = 0, part = 1;

    while (at < length) {
        size_t size = length - at < part ? length - at : part;

        REQUIRE(write(fd, bytes + at, size) == (ssize_t)size);
        at += size;
        part = part * 5 % 70001 + 1;
    }
    close(fd);
    return NULL;
}

static void pieces_of_any_size_make_the_same_pages(void)
{
    int ends[2], pages = memory_file("", 0, PAGES * PAGE);
    struct qpc_error err = { 0 };
    struct qpc_stream_progress progress;
    struct qpc_stream *stream;
    pthread_t thread;
    char tail[4];

    length = 0;
    for (int round = 1; round <= 20; round++)
        for (uint32_t page = 0; page < PAGES; page++)
            put_page(page, page == 0 ? "m0" : NULL, (uint8_t)(page + (uint32_t)round));
    put_header(0x10);
    put("tail", 4);
    REQUIRE(pipe(ends) == 0);
    REQUIRE(pthread_create(&thread, NULL, write_slowly, &ends[1]) == 0);
    stream = qpc_stream_create(ends[0], 0, &err);
    REQUIRE(stream);
    REQUIRE(qpc_stream_add_block(stream, "m0", PAGES * PAGE, PAGE, pages, 0, &err) == 0);
    REQUIRE(qpc_stream_ram_section(stream, -1, &err) == 0);
    REQUIRE(qpc_stream_peek(stream, tail, 4, &err) == 4);
    REQUIRE(qpc_stream_read(stream, tail, 4, &err) == 0 && memcmp(tail, "tail", 4) == 0);
    REQUIRE(qpc_stream_peek(stream, tail, 4, &err) == 0);
    REQUIRE(qpc_stream_read(stream, tail, 1, &err) < 0 && err.code == QPC_FORMAT);
    qpc_stream_read_progress(stream, &progress);
    REQUIRE(progress.bytes == length && progress.pages_data == 20 * PAGES);
    for (uint32_t page = 0; page < PAGES; page++)
        REQUIRE(first_byte(pages, page) == (uint8_t)(page + 20));
    pthread_join(thread, NULL);
    qpc_stream_destroy(stream);
    close(ends[0]);
    close(pages);
}

static void *cancel_when_all_was_read(void *argument)
{
    struct qpc_stream *stream = argument;
    struct qpc_stream_progress progress;

    do
        qpc_stream_read_progress(stream, &progress);
    while (progress.pages_data < 3);
    qpc_stream_cancel(stream);
    return NULL;
}

static void a_waiting_reader_can_be_cancelled(void)
{
    int ends[2], pages = memory_file("", 0, PAGES * PAGE);
    struct qpc_error err = { 0 };
    struct qpc_stream *stream;
    pthread_t thread;

    length = 0;
    for (uint32_t page = 0; page < 3; page++)
        put_page(page, "m0", 1);
    REQUIRE(pipe(ends) == 0 && write(ends[1], bytes, length) == (ssize_t)length);
    stream = qpc_stream_create(ends[0], 0, &err);
    REQUIRE(stream);
    REQUIRE(qpc_stream_add_block(stream, "m0", PAGES * PAGE, PAGE, pages, 0, &err) == 0);
    REQUIRE(pthread_create(&thread, NULL, cancel_when_all_was_read, stream) == 0);
    REQUIRE(qpc_stream_ram_section(stream, -1, &err) < 0);
    REQUIRE(err.code == QPC_SYSTEM && err.errnum == ECANCELED);
    pthread_join(thread, NULL);
    qpc_stream_destroy(stream);
    close(ends[0]);
    close(ends[1]);
    close(pages);
}

static void records_written_are_read_back(void)
{
    int source = memory_file("", 0, PAGES * PAGE), target = memory_file("", 0, PAGES * PAGE);
    int copy = memory_file("", 0, (PAGES + 1) * PAGE);
    int out = memory_file("", 0, 0);
    static uint8_t a[PAGES * PAGE], b[PAGES * PAGE];
    uint8_t bitmap[PAGES / 8] = { 0 }, copied[PAGES / 8] = { 0 };
    int64_t count;
    struct qpc_error err = { 0 };
    uint64_t written;

    for (uint32_t page = 0; page < PAGES; page += 1 + page % 5) {
        memset(a, (int)page, PAGE); /* page 0 is stored, but of zeros */
        REQUIRE(pwrite(source, a, PAGE, page * PAGE) == PAGE);
    }
    REQUIRE(qpc_page_file_write_records(source, 0, NULL, PAGES * PAGE, PAGE, "m0", out, -1, &err)
            == 0);
    length = (size_t)pread(out, bytes, sizeof(bytes), 0);
    put_header(0x10);
    REQUIRE(feed(target, -1, &written, &err) == 0);
    REQUIRE(pread(source, a, sizeof(a), 0) == sizeof(a));
    REQUIRE(pread(target, b, sizeof(b), 0) == sizeof(b) && memcmp(a, b, sizeof(a)) == 0);
    count = qpc_page_file_bitmap(target, 0, PAGES * PAGE, PAGE, bitmap, &err);
    for (uint32_t page = 0; page < PAGES; page++)
        count -= bitmap[page / 8] >> page % 8 & 1;
    REQUIRE(count == 0);
    REQUIRE(!(bitmap[0] & 1)); /* the page of zeros became a hole */
    REQUIRE(qpc_page_file_copy(source, 0, NULL, PAGES * PAGE, PAGE, copy, PAGE, copied, -1, &err)
            == 0);
    REQUIRE(memcmp(bitmap, copied, sizeof(bitmap)) == 0);
    REQUIRE(pread(copy, b, sizeof(b), PAGE) == sizeof(b) && memcmp(a, b, sizeof(a)) == 0);
    /* A file that ends too early is an error, never zeros. */
    memset(bitmap, 0xff, sizeof(bitmap));
    REQUIRE(ftruncate(source, 5 * PAGE + 1) == 0);
    REQUIRE(qpc_page_file_copy(source, 0, bitmap, PAGES * PAGE, PAGE, copy, PAGE, NULL, -1, &err)
            < 0);
    REQUIRE(err.code == QPC_FORMAT);
    close(source);
    close(target);
    close(copy);
    close(out);
}

int main(void)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } checks[] = {
#define CHECK(name) { #name, name }
        CHECK(pages_reach_their_files),
        CHECK(a_stream_cut_anywhere_is_an_error),
        CHECK(malformed_records_are_refused),
        CHECK(random_changes_do_no_harm),
        CHECK(impossible_blocks_are_refused),
        CHECK(a_full_disk_is_reported),
        CHECK(pieces_of_any_size_make_the_same_pages),
        CHECK(a_waiting_reader_can_be_cancelled),
        CHECK(records_written_are_read_back),
    };

    for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++) {
        printf("%s\n", checks[i].name);
        fflush(stdout);
        checks[i].run();
    }
    return 0;
}
