/*
 * Save files served in place, without Python, for sanitizers: what the scan of a stream notes and
 * what is read by it, against what the conversion of the same stream makes of it. Prints the name of
 * each check; exits with 1 at the first that fails.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "saved_pages.h"
#include "stream.h"

#define PAGE 4096u
#define PAGES 64u
#define RUNS_MAX (PAGES + 1)
#define HEAD "something before the stream"
#define REQUIRE(what)                                                                              \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            fprintf(stderr, "%s:%d: %s\n", __func__, __LINE__, #what);                            \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static uint8_t bytes[1u << 20];
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

static void begin(void)
{
    length = 0;
    put(HEAD, sizeof(HEAD));
}

static int memory_file(const void *data, size_t size, size_t file_size)
{
    int fd = memfd_create("test", MFD_CLOEXEC);

    REQUIRE(fd >= 0 && ftruncate(fd, (off_t)file_size) == 0);
    REQUIRE(pwrite(fd, data, size, 0) == (ssize_t)size);
    return fd;
}

static struct qpc_saved_identity identity_of(int fd)
{
    struct stat st;

    REQUIRE(fstat(fd, &st) == 0);
    return (struct qpc_saved_identity){ (uint64_t)st.st_size, st.st_mtim.tv_sec,
                                        st.st_mtim.tv_nsec };
}

/* A file with what was put, and what its scan found. */
struct saved {
    int fd;
    int result;
    uint64_t end;
    struct qpc_saved_counts counts;
    uint64_t run_count;
    struct qpc_saved_run runs[RUNS_MAX];
};

static struct saved scan_file(int fd, int records_fd, struct qpc_error *err)
{
    struct saved saved = { .fd = fd, .end = sizeof(HEAD) };
    struct qpc_saved_scan *scan = qpc_saved_scan_create(fd, err);

    REQUIRE(scan);
    REQUIRE(qpc_saved_scan_add_block(scan, "m0", PAGES * PAGE, PAGE, 1, err) == 0);
    REQUIRE(qpc_saved_scan_add_block(scan, "rom", 4 * PAGE, PAGE, 0, err) == 1);
    saved.result = qpc_saved_scan_section(scan, saved.end, records_fd, &saved.end, err);
    REQUIRE(qpc_saved_scan_counts(scan, 0, &saved.counts, err) == 0);
    saved.run_count = qpc_saved_scan_runs(scan, 0, saved.runs, RUNS_MAX);
    REQUIRE(saved.run_count == qpc_saved_scan_runs(scan, 0, NULL, 0));
    REQUIRE(saved.run_count <= PAGES && qpc_saved_scan_runs(scan, 1, NULL, 0) == 0);
    qpc_saved_scan_destroy(scan);
    return saved;
}

static struct saved scan(int records_fd, struct qpc_error *err)
{
    return scan_file(memory_file(bytes, length, length), records_fd, err);
}

static struct qpc_source *source_of(const struct saved *saved)
{
    struct qpc_saved_identity identity = identity_of(saved->fd);
    struct qpc_error err = { 0 };
    struct qpc_source *source = qpc_source_open_saved(dup(saved->fd), saved->runs, saved->run_count,
                                                      PAGES * PAGE, PAGE, &identity, &err);

    REQUIRE(source);
    return source;
}

static void require_page(struct qpc_source *source, uint64_t page, uint8_t fill)
{
    static uint8_t expected[PAGE], found[PAGE];

    memset(expected, fill, PAGE);
    memset(found, 0xee, PAGE);
    REQUIRE(qpc_source_read(source, page * PAGE, PAGE, found) == 0);
    REQUIRE(memcmp(expected, found, PAGE) == 0);
}

static void pages_are_found_where_they_lie(void)
{
    static uint8_t whole[PAGES * PAGE], part[PAGES * PAGE];
    int records = memory_file("", 0, 0);
    struct qpc_error err = { 0 };
    struct qpc_source *source;
    struct saved saved;
    uint8_t bitmap[PAGES / 8] = { 0 }, large = 0;

    begin();
    put_page(0, "m0", 1);
    put_page(1, NULL, 2);
    put_page(2, NULL, 3);
    put_page(PAGES - 1, NULL, 4);
    put_page(7, NULL, 5);
    put_page(7, NULL, 6); /* the later wins */
    put_page(8, NULL, 7);
    put_zero(8, NULL, 0);
    put_zero(9, NULL, 0);
    put_page(9, NULL, 8);
    put_page(10, NULL, 0); /* zeros sent as data */
    put_page(3, "rom", 9);
    put_zero(2, NULL, 0);
    put_page(11, "m0", 10);
    put_page(12, NULL, 11);
    put_header(0x10);
    put("behind", 6);
    saved = scan(records, &err);
    REQUIRE(saved.result == 0 && saved.end == length - 6);
    REQUIRE(saved.counts.pages_known == 9 && saved.counts.pages_data == 11);
    REQUIRE(saved.counts.pages_zero == 2);
    REQUIRE(lseek(records, 0, SEEK_END) == 8 + 4 + PAGE + 8 + 4 + 1);
    REQUIRE(saved.runs[0].first_page == 0 && saved.runs[0].count == 3);
    REQUIRE(saved.runs[0].head_bytes == 8 + 3 && saved.runs[1].head_bytes == 8);

    source = source_of(&saved);
    require_page(source, 0, 1);
    require_page(source, 1, 2);
    require_page(source, 2, 3);
    require_page(source, 3, 0);
    require_page(source, 7, 6);
    require_page(source, 8, 0);
    require_page(source, 9, 8);
    require_page(source, 10, 0);
    require_page(source, 11, 10);
    require_page(source, 12, 11);
    require_page(source, PAGES - 1, 4);
    /* Any range of pages is the same as its pages. */
    REQUIRE(qpc_source_read(source, 0, sizeof(whole), whole) == 0);
    for (uint64_t first = 0; first < 16; first++)
        for (uint64_t end = first + 1; end <= 16; end++) {
            REQUIRE(qpc_source_read(source, first * PAGE, (end - first) * PAGE, part) == 0);
            REQUIRE(memcmp(part, whole + first * PAGE, (end - first) * PAGE) == 0);
        }
    REQUIRE(qpc_source_read(source, 1, PAGE, part) == EINVAL);
    REQUIRE(qpc_source_read(source, PAGES * PAGE, PAGE, part) == EINVAL);
    REQUIRE(qpc_source_read(source, ~0ull - PAGE + 1, PAGE, part) == EINVAL);
    qpc_saved_data_bitmap(saved.runs, saved.run_count, PAGE, PAGE, bitmap);
    REQUIRE(bitmap[0] == 0x87 && bitmap[1] == 0x1e && bitmap[2] == 0 && bitmap[7] == 0x80);
    qpc_saved_data_bitmap(saved.runs, saved.run_count, PAGE, 32 * PAGE, &large);
    REQUIRE(large == 3);
    qpc_source_close(source);
    close(saved.fd);
    close(records);
}

static void a_stream_cut_anywhere_is_an_error(void)
{
    struct qpc_error err = { 0 };
    size_t whole;

    begin();
    put_page(0, "m0", 1);
    put_zero(1, "rom", 0);
    put_header(0x10);
    whole = length;
    for (length = sizeof(HEAD); length < whole; length++) {
        struct saved saved = scan(-1, &err);

        REQUIRE(saved.result < 0 && err.code == QPC_FORMAT);
        close(saved.fd);
    }
}

/* The same bytes through the scan, and through the reader that copies. */
static int compare(struct qpc_error *err)
{
    static uint8_t a[PAGES * PAGE], b[PAGES * PAGE], more_a[8 * PAGE], more_b[8 * PAGE];
    int pages = memory_file("", 0, PAGES * PAGE);
    int records = memory_file("", 0, 0), copied_records = memory_file("", 0, 0);
    struct saved saved = scan(records, err);
    struct qpc_error other = { 0 };
    struct qpc_stream *stream;
    ssize_t size;
    int result;

    REQUIRE(saved.result >= 0 || err->code == QPC_FORMAT);
    REQUIRE(lseek(saved.fd, sizeof(HEAD), SEEK_SET) == sizeof(HEAD));
    stream = qpc_stream_create(saved.fd, sizeof(HEAD), &other);
    REQUIRE(stream);
    REQUIRE(qpc_stream_add_block(stream, "m0", PAGES * PAGE, PAGE, pages, 0, &other) == 0);
    REQUIRE(qpc_stream_add_block(stream, "rom", 4 * PAGE, PAGE, -1, 0, &other) == 1);
    result = qpc_stream_ram_section(stream, copied_records, &other);
    REQUIRE(result == saved.result);
    if (result == 0) {
        struct qpc_source *source = source_of(&saved);

        REQUIRE(saved.end == qpc_stream_offset(stream));
        REQUIRE(qpc_source_read(source, 0, sizeof(a), a) == 0);
        REQUIRE(pread(pages, b, sizeof(b), 0) == sizeof(b) && memcmp(a, b, sizeof(a)) == 0);
        size = pread(records, more_a, sizeof(more_a), 0);
        REQUIRE(size >= 0 && pread(copied_records, more_b, sizeof(more_b), 0) == size);
        REQUIRE(memcmp(more_a, more_b, (size_t)size) == 0);
        qpc_source_close(source);
    }
    qpc_stream_destroy(stream);
    close(saved.fd);
    close(pages);
    close(records);
    close(copied_records);
    return result;
}

static void whatever_a_stream_says_the_conversion_finds_the_same(void)
{
    static const uint64_t headers[] = {
        0x00, 0x01, 0x0a, 0x04, 0x18, 0x12, 0x20, 0x30, 0x40 | 8, 0x80, 0x100, 0x200, 0x210,
        0x400, 0x800, 0x28, 0x22, PAGE | 0x10, ~0ull, PAGES * PAGE | 8, (1ull << 63) | 8,
        (~0ull & ~0xfffull) | 2,
    };
    static uint8_t good[sizeof(bytes)];
    struct qpc_error err = { 0 };
    uint32_t accepted = 0;
    size_t whole;

    for (size_t i = 0; i < sizeof(headers) / sizeof(headers[0]); i++) {
        begin();
        put_header(headers[i]);
        put_name("m0");
        memset(bytes + length, 0, PAGE);
        length += PAGE;
        REQUIRE(compare(&err) < 0);
    }
    begin();
    put_page(0, "unknown", 1);
    REQUIRE(compare(&err) < 0 && strstr(err.message, "unknown"));
    begin();
    put_zero(0, "m0", 5);
    REQUIRE(compare(&err) < 0 && strstr(err.message, "filled"));

    srandom(7);
    begin();
    for (uint32_t page = 0; page < 12; page++)
        page % 3 ? put_page(page, page % 2 ? "m0" : NULL, (uint8_t)page) : put_zero(page, "m0", 0);
    put_page(1, "rom", 9);
    put_zero(2, NULL, 0);
    put_header(0x10);
    whole = length;
    memcpy(good, bytes, whole);
    for (int round = 0; round < 2000; round++) {
        memcpy(bytes, good, whole);
        length = whole;
        for (int change = 0; change <= round % 3; change++)
            bytes[sizeof(HEAD) + (size_t)random() % (whole - sizeof(HEAD))] = (uint8_t)random();
        accepted += compare(&err) == 0;
    }
    REQUIRE(accepted > 0 && accepted < 2000);
}

static void a_file_cut_short_under_the_scan_is_an_error_and_no_signal(void)
{
    struct qpc_error err = { 0 };
    struct qpc_saved_scan *scan;
    uint64_t end;
    int fd;

    begin();
    for (uint32_t page = 0; page < PAGES; page++)
        put_page(page, page ? NULL : "m0", 1);
    put_header(0x10);
    fd = memory_file(bytes, length, length);
    scan = qpc_saved_scan_create(fd, &err);
    REQUIRE(scan);
    REQUIRE(qpc_saved_scan_add_block(scan, "m0", PAGES * PAGE, PAGE, 1, &err) == 0);
    REQUIRE(ftruncate(fd, 10 * PAGE) == 0);
    REQUIRE(qpc_saved_scan_section(scan, sizeof(HEAD), -1, &end, &err) < 0);
    REQUIRE(err.code == QPC_FORMAT && strstr(err.message, "cut short"));
    qpc_saved_scan_destroy(scan);
    close(fd);
}

static void a_file_that_was_changed_is_never_read(void)
{
    struct qpc_error err = { 0 };
    static uint8_t buffer[PAGES * PAGE];
    struct qpc_source *source;
    struct timespec times[2];
    struct saved saved;
    struct stat st;

    begin();
    put_page(0, "m0", 1);
    put_page(1, NULL, 2);
    put_header(0x10);
    saved = scan(-1, &err);
    REQUIRE(fstat(saved.fd, &st) == 0);
    source = source_of(&saved);
    require_page(source, 1, 2);
    /* Another time of writing is enough, whatever was written. */
    times[0] = times[1] = (struct timespec){ st.st_mtim.tv_sec + 1, st.st_mtim.tv_nsec };
    REQUIRE(futimens(saved.fd, times) == 0);
    REQUIRE(qpc_source_read(source, 0, PAGE, buffer) == ESTALE);
    /* A record that is another's is seen though the time says nothing. */
    REQUIRE(pwrite(saved.fd, "x", 1, sizeof(HEAD) + 11 + PAGE) == 1);
    times[0] = times[1] = st.st_mtim;
    REQUIRE(futimens(saved.fd, times) == 0);
    require_page(source, 0, 1);
    REQUIRE(qpc_source_read(source, PAGE, PAGE, buffer) == ESTALE);
    REQUIRE(qpc_source_read(source, 0, 2 * PAGE, buffer) == ESTALE);
    /* Put back, it can be read again. */
    REQUIRE(pwrite(saved.fd, "\0", 1, sizeof(HEAD) + 11 + PAGE) == 1);
    REQUIRE(futimens(saved.fd, times) == 0);
    require_page(source, 1, 2);
    REQUIRE(ftruncate(saved.fd, PAGE) == 0);
    REQUIRE(qpc_source_read(source, 0, PAGE, buffer) == ENODATA);
    REQUIRE(qpc_source_read(source, PAGE, PAGE, buffer) == ENODATA);
    qpc_source_close(source);
    close(saved.fd);
}

static void a_long_file_is_scanned_in_parts(void)
{
    static uint8_t record[8 + PAGE];
    uint64_t pages = 40000, end, run_count; /* 156 MiB */
    int fd = memory_file("", 0, 0), parts = 1, result;
    struct qpc_saved_scan *scan;
    struct qpc_error err = { 0 };
    struct qpc_saved_run run;
    FILE *out = fdopen(dup(fd), "w");

    REQUIRE(out);
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t header = __builtin_bswap64(page * PAGE | 0x08 | (page ? 0x20 : 0));

        memcpy(record, &header, 8);
        memcpy(record + 8, &page, 8);
        REQUIRE(fwrite(record, 1, 8, out) == 8);
        REQUIRE(page || fwrite("\2m0", 1, 3, out) == 3);
        REQUIRE(fwrite(record + 8, 1, PAGE, out) == PAGE);
    }
    REQUIRE(fwrite("\0\0\0\0\0\0\0\x10", 1, 8, out) == 8 && fclose(out) == 0);
    scan = qpc_saved_scan_create(fd, &err);
    REQUIRE(scan);
    REQUIRE(qpc_saved_scan_add_block(scan, "m0", pages * PAGE, PAGE, 1, &err) == 0);
    for (end = 0; (result = qpc_saved_scan_section(scan, end, -1, &end, &err)) == 1;)
        parts++;
    REQUIRE(result == 0 && parts == 3 && end == pages * (8 + PAGE) + 3 + 8);
    run_count = qpc_saved_scan_runs(scan, 0, &run, 1);
    REQUIRE(run_count == 1 && run.count == pages);
    qpc_saved_scan_destroy(scan);
    {
        struct qpc_saved_identity identity = identity_of(fd);
        static uint8_t buffer[512 * PAGE];
        struct qpc_source *source =
            qpc_source_open_saved(fd, &run, 1, pages * PAGE, PAGE, &identity, &err);

        REQUIRE(source && qpc_source_read(source, 20000 * PAGE, sizeof(buffer), buffer) == 0);
        for (uint64_t i = 0; i < 512; i++)
            REQUIRE(memcmp(buffer + i * PAGE, &(uint64_t){ 20000 + i }, 8) == 0);
        qpc_source_close(source);
    }
}

static void pages_of_a_mapped_file_are_read_by_its_bitmap_alone(void)
{
    static uint8_t data[PAGES * PAGE + 100], buffer[PAGES * PAGE];
    uint8_t bitmap[PAGES / 8] = { 0x0f, 0x80, 0x01 };
    struct qpc_error err = { 0 };
    struct saved saved;
    struct qpc_source *source;

    memset(data, 7, sizeof(data)); /* data where the bitmap says none is stale */
    saved.fd = memory_file(data, sizeof(data), sizeof(data));
    saved.run_count = qpc_saved_bitmap_runs(bitmap, PAGES, 100, PAGE, saved.runs, RUNS_MAX);
    REQUIRE(saved.run_count == 2 && qpc_saved_bitmap_runs(bitmap, PAGES, 100, PAGE, NULL, 0) == 2);
    source = source_of(&saved);
    for (uint64_t page = 0; page < PAGES; page++)
        require_page(source, page, page < 4 || page == 15 || page == 16 ? 7 : 0);
    REQUIRE(qpc_source_read(source, 0, sizeof(buffer), buffer) == 0);
    REQUIRE(buffer[3 * PAGE] == 7 && buffer[4 * PAGE] == 0 && buffer[17 * PAGE - 1] == 7);
    qpc_source_close(source);
    close(saved.fd);
    (void)err;
}

static void runs_that_lie_are_refused(void)
{
    static const struct qpc_saved_run good = { 1, 100, 2, 8 };
    struct qpc_saved_run runs[3];
    struct qpc_saved_identity identity;
    struct qpc_error err = { 0 };
    int fd = memory_file("", 0, 4 * PAGE);

    identity = identity_of(fd);
#define REFUSED(count, ...)                                                                        \
    do {                                                                                           \
        struct qpc_saved_run bad[] = { __VA_ARGS__ };                                              \
        memcpy(runs, bad, sizeof(bad));                                                            \
        REQUIRE(!qpc_source_open_saved(fd, runs, count, 4 * PAGE, PAGE, &identity, &err));         \
        REQUIRE(err.code == QPC_FORMAT);                                                           \
    } while (0)
    REFUSED(1, { 1, 100, 0, 8 });
    REFUSED(1, { 4, 100, 1, 8 });
    REFUSED(1, { ~0ull, 100, 2, 8 });
    REFUSED(1, { 3, 100, 2, 8 });
    REFUSED(1, { 1, 100, UINT32_MAX, 8 });
    REFUSED(1, { 1, 100, 2, 7 });
    REFUSED(1, { 1, 100, 2, 265 });
    REFUSED(1, { 1, 7, 2, 8 });
    REFUSED(1, { 1, ~0ull, 2, 8 });
    REFUSED(1, { 1, 2 * PAGE, 2, 8 });
    REFUSED(1, { 1, 2 * PAGE + 1, 2, 0 });
    REFUSED(2, good, { 2, 100, 1, 8 });
    REFUSED(5, good, good, good);
#undef REFUSED
    runs[0] = good;
    REQUIRE(!qpc_source_open_saved(fd, runs, 1, 4 * PAGE, 3000, &identity, &err));
    REQUIRE(!qpc_source_open_saved(-1, runs, 1, 4 * PAGE, PAGE, &identity, &err));
    {
        struct qpc_source *source =
            qpc_source_open_saved(fd, runs, 1, 4 * PAGE, PAGE, &identity, &err);

        REQUIRE(source);
        qpc_source_close(source);
    }
}

static void a_full_disk_is_reported(void)
{
    struct qpc_error err = { 0 };
    int full = open("/dev/full", O_RDWR);
    struct saved saved;

    begin();
    put_page(0, "rom", 1);
    put_header(0x10);
    saved = scan(full, &err);
    REQUIRE(saved.result < 0 && err.code == QPC_SYSTEM && err.errnum == ENOSPC);
    close(saved.fd);
    close(full);
}

int main(void)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } checks[] = {
#define CHECK(name) { #name, name }
        CHECK(pages_are_found_where_they_lie),
        CHECK(a_stream_cut_anywhere_is_an_error),
        CHECK(whatever_a_stream_says_the_conversion_finds_the_same),
        CHECK(a_file_cut_short_under_the_scan_is_an_error_and_no_signal),
        CHECK(a_file_that_was_changed_is_never_read),
        CHECK(a_long_file_is_scanned_in_parts),
        CHECK(pages_of_a_mapped_file_are_read_by_its_bitmap_alone),
        CHECK(runs_that_lie_are_refused),
        CHECK(a_full_disk_is_reported),
    };

    for (size_t i = 0; i < sizeof(checks) / sizeof(checks[0]); i++) {
        printf("%s\n", checks[i].name);
        checks[i].run();
    }
    return 0;
}
