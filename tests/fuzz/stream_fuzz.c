/*
 * The C half of the stream reader under libFuzzer (clang -fsanitize=fuzzer,address,undefined):
 * one RAM section of a lazy and of an eager block, copied and scanned in place, which must come to
 * the same. Built without libFuzzer, with -DREPLAY, it runs
 * the files that are named instead.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
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
#define REQUIRE(what)                                                                              \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            fprintf(stderr, "%d: %s\n", __LINE__, #what);                                          \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int file_of(const uint8_t *data, size_t size)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC);

    REQUIRE(fd >= 0 && write(fd, data, size) == (ssize_t)size && lseek(fd, 0, SEEK_SET) == 0);
    return fd;
}

/* The scan of a save file's records against what their copy came to. */
static void scan_the_same(int in, int pages, int copied, uint64_t copied_end)
{
    static uint8_t found[PAGES * PAGE], expected[PAGES * PAGE];
    struct qpc_saved_run runs[PAGES];
    struct qpc_error err = { 0 };
    struct qpc_saved_scan *scan = qpc_saved_scan_create(in, &err);
    uint64_t end = 0, count;
    int result;

    REQUIRE(scan);
    REQUIRE(qpc_saved_scan_add_block(scan, "m0", PAGES * PAGE, PAGE, 1, &err) == 0);
    REQUIRE(qpc_saved_scan_add_block(scan, "rom", 4 * PAGE, PAGE, 0, &err) == 1);
    result = qpc_saved_scan_section(scan, 0, -1, &end, &err);
    REQUIRE(result == copied && (result == 0 || err.message[0]));
    count = qpc_saved_scan_runs(scan, 0, runs, PAGES);
    REQUIRE(count <= PAGES);
    if (result == 0) {
        struct stat st;
        struct qpc_saved_identity identity;
        struct qpc_source *source;

        REQUIRE(end == copied_end && fstat(in, &st) == 0);
        identity = (struct qpc_saved_identity){ (uint64_t)st.st_size, st.st_mtim.tv_sec,
                                                st.st_mtim.tv_nsec };
        source = qpc_source_open_saved(dup(in), runs, count, PAGES * PAGE, PAGE, &identity, &err);
        REQUIRE(source && qpc_source_read(source, 0, sizeof(found), found) == 0);
        REQUIRE(pread(pages, expected, sizeof(expected), 0) == sizeof(expected));
        REQUIRE(memcmp(found, expected, sizeof(found)) == 0);
        qpc_source_close(source);
    }
    qpc_saved_scan_destroy(scan);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct qpc_error err = { 0 };
    int result, in = file_of(data, size), pages = file_of(NULL, 0), records = file_of(NULL, 0);
    struct qpc_stream *stream = qpc_stream_create(in, 0, &err);
    struct qpc_stream_progress progress;
    struct qpc_stream_counts counts;

    REQUIRE(stream && ftruncate(pages, PAGES * PAGE) == 0);
    REQUIRE(qpc_stream_add_block(stream, "m0", PAGES * PAGE, PAGE, pages, 0, &err) == 0);
    REQUIRE(qpc_stream_add_block(stream, "rom", 4 * PAGE, PAGE, -1, 0, &err) == 1);
    result = qpc_stream_ram_section(stream, records, &err);
    if (result < 0)
        REQUIRE(err.code != QPC_OK && err.message[0]);
    REQUIRE(qpc_stream_offset(stream) <= size);
    REQUIRE(qpc_stream_read_counts(stream, 0, &counts, &err) == 0);
    REQUIRE(counts.pages_written <= PAGES);
    qpc_stream_read_progress(stream, &progress);
    REQUIRE(progress.bytes <= size);
    REQUIRE(lseek(pages, 0, SEEK_END) == PAGES * PAGE);
    scan_the_same(in, pages, result, qpc_stream_offset(stream));
    qpc_stream_destroy(stream);
    close(records);
    close(pages);
    close(in);
    return 0;
}

#ifdef REPLAY
int main(int argc, char **argv)
{
    static uint8_t data[1u << 20];

    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");

        REQUIRE(file);
        LLVMFuzzerTestOneInput(data, fread(data, 1, sizeof(data), file));
        fclose(file);
    }
    printf("%d replayed\n", argc - 1);
    return 0;
}
#endif
