/*
 * The pager in C alone, to be built with sanitizers. Mapper and pager share this process; the
 * thread that serves is the pager's own, the others touch, remove, stop, start and ask.
 *
 *   pager_test CASE               (exit 0: right, 1: wrong, 77: no userfaultfd here)
 *
 * Page n holds PATTERN(n) in every word; every eighth page is a hole.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pager.h"
#include "source_chaos.h"
#include "uffd.h"

#define PAGES 2048u
#define PAGE 4096u
#define WORDS (PAGE / 8)
#define PATTERN(page) (0x9e3779b97f4a7c15ull * ((page) + 1))
#define IS_HOLE(page) ((page) % 8 == 7)
#define REMOVED_PAGES 64u /* the first ones, in the storm */

static char *memory;
static uint8_t bitmap[PAGES / 8];
static uint8_t ledger[PAGES];
static int uffd;
static struct qpc_source *source;
static const struct qpc_chaos_schedule *chaos;
static struct qpc_pager *pager;
static atomic_int finished;

static void require(int condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "wrong: %s\n", what);
        exit(1);
    }
}

static void make(uint64_t chunk, int background)
{
    struct qpc_pager_options options = { .chunk_size = chunk, .background = background,
                                         .spin_limit_us = 200 };
    struct qpc_pager_block block = { .length = PAGES * PAGE, .page_size = PAGE,
                                     .data_bitmap = bitmap, .ledger = ledger };
    struct qpc_error err = { 0 };
    uint64_t features;
    int source_fd = memfd_create("source", MFD_CLOEXEC);

    require(source_fd >= 0 && ftruncate(source_fd, PAGES * PAGE) == 0, "source");
    for (uint64_t page = 0; page < PAGES; page++) {
        uint64_t words[WORDS];

        for (unsigned i = 0; i < WORDS; i++)
            words[i] = PATTERN(page);
        require(pwrite(source_fd, words, PAGE, (off_t)(page * PAGE)) == PAGE, "source data");
        if (!IS_HOLE(page))
            bitmap[page / 8] |= (uint8_t)(1u << page % 8);
    }
    source = qpc_source_open_file(source_fd, &err);
    require(source != NULL, err.message);
    if (chaos) {
        source = qpc_source_open_chaos(source, chaos, &err);
        require(source != NULL, err.message);
    }
    block.source = source;
    memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(memory != MAP_FAILED && madvise(memory, PAGES * PAGE, MADV_NOHUGEPAGE) == 0, "memory");
    uffd = qpc_uffd_open(&err);
    if (uffd < 0) {
        printf("%s\n", err.message);
        exit(77);
    }
    require(qpc_uffd_features(&features, &err) == 0 &&
                qpc_uffd_api(uffd, qpc_uffd_wanted_features(features), &err) == 0 &&
                qpc_uffd_register(uffd, (uintptr_t)memory, PAGES * PAGE, &err) >= 0,
            "registration");
    options.userfaultfd = uffd;
    block.address = (uintptr_t)memory;
    pager = qpc_pager_create(&options, &block, 1, &err);
    require(pager != NULL, err.message);
    require(qpc_pager_start(pager, &err) == 0, err.message);
}

/* Compares one word, which faults, and says what it should have been. */
static void check_page(uint64_t page, int may_be_zero)
{
    uint64_t word = __atomic_load_n((uint64_t *)(memory + page * PAGE + page % WORDS * 8),
                                    __ATOMIC_RELAXED);

    if (IS_HOLE(page) ? word != 0 : word != PATTERN(page) && !(may_be_zero && word == 0)) {
        fprintf(stderr, "page %llu holds %#llx\n", (unsigned long long)page,
                (unsigned long long)word);
        exit(1);
    }
}

static void *touch_at_random(void *seed)
{
    uint64_t state = (uintptr_t)seed * 88172645463325252ull + 1;

    for (unsigned i = 0; i < 4 * PAGES; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        check_page(state % PAGES, state % PAGES < REMOVED_PAGES);
    }
    return NULL;
}

static void *remove_again_and_again(void *unused)
{
    (void)unused;
    while (!finished)
        require(madvise(memory, REMOVED_PAGES * PAGE, MADV_DONTNEED) == 0, "madvise");
    return NULL;
}

static void *ask(void *unused)
{
    (void)unused;
    for (int on = 0; !finished; on = !on) {
        struct qpc_pager_statistics statistics;

        qpc_pager_read_statistics(pager, &statistics);
        require(statistics.pages_data_missing <= statistics.pages_data, "counters");
        qpc_pager_thread_id(pager);
        qpc_pager_set_background(pager, on, 64 << 20);
        usleep(200);
    }
    return NULL;
}

static void *stop_and_start(void *unused)
{
    (void)unused;
    while (!finished) {
        struct qpc_error err = { 0 };

        require(qpc_pager_stop(pager, &err) == 0, err.message);
        require(qpc_pager_start(pager, &err) == 0, err.message);
        usleep(500);
    }
    return NULL;
}

static void run_threads(void *(*const disturbances[])(void *), unsigned disturbance_count)
{
    pthread_t touchers[4], others[3];

    for (unsigned i = 0; i < disturbance_count; i++)
        require(!pthread_create(&others[i], NULL, disturbances[i], NULL), "thread");
    for (uintptr_t i = 0; i < 4; i++)
        require(!pthread_create(&touchers[i], NULL, touch_at_random, (void *)i), "thread");
    for (unsigned i = 0; i < 4; i++)
        pthread_join(touchers[i], NULL);
    finished = 1;
    for (unsigned i = 0; i < disturbance_count; i++)
        pthread_join(others[i], NULL);
}

static void check_all(uint64_t first)
{
    for (uint64_t page = first; page < PAGES; page++)
        check_page(page, 0);
}

static void fill_all(void)
{
    struct qpc_pager_statistics statistics;

    make(64 << 10, 1);
    do {
        usleep(500);
        qpc_pager_read_statistics(pager, &statistics);
    } while (statistics.state != QPC_PAGER_COMPLETE);
    require(statistics.pages_data_missing == 0, "nothing is missing");
    check_all(0);
}

static void touch_and_ask(void)
{
    void *(*const disturbances[])(void *) = { ask };

    make(4096, 0);
    run_threads(disturbances, 1);
    check_all(0);
}

static void storm(void)
{
    void *(*const disturbances[])(void *) = { remove_again_and_again, ask };

    make(16 << 10, 1);
    run_threads(disturbances, 2);
    check_all(REMOVED_PAGES);
    for (uint64_t page = 0; page < REMOVED_PAGES; page++)
        require(*(volatile uint64_t *)(memory + page * PAGE) == 0, "removed memory is zero");
}

static void interrupted(void)
{
    void *(*const disturbances[])(void *) = { stop_and_start };

    make(4096, 0);
    run_threads(disturbances, 1);
    check_all(0);
}

static void *enable_and_release(void *unused)
{
    (void)unused;
    for (int on = 0; !finished; on = !on) {
        struct qpc_chaos_counts counts;

        qpc_chaos_enable(source, on);
        qpc_chaos_release(source);
        qpc_chaos_read_counts(source, &counts);
        require(counts.failed + counts.truncated <= counts.reads, "counts");
        usleep(3000);
    }
    qpc_chaos_enable(source, 0);
    return NULL;
}

/* Reads fail, come late and wait for ever, while the pager is stopped and told to go on. */
static void failing(void)
{
    static const struct qpc_chaos_schedule schedule = {
        .seed = 1, .fail = 1u << 29, .error_count = 1, .errors = { 5 }, .truncate = 1u << 28,
        .delay = 1u << 29, .delay_us_first = 1, .delay_us_last = 100, .stall = 1u << 26,
        .burst_first = 1, .burst_last = 3,
    };
    void *(*const disturbances[])(void *) = { stop_and_start, enable_and_release };
    struct qpc_chaos_counts counts;

    chaos = &schedule;
    make(4096, 1);
    run_threads(disturbances, 2);
    check_all(0);
    qpc_chaos_read_counts(source, &counts);
    require(counts.failed && counts.truncated && counts.delayed && counts.stalled, "all happened");
}

static void *touch_one(void *page)
{
    check_page((uintptr_t)page, 0);
    return NULL;
}

/* More faults at once than the ring has room for (built with a short ring). */
static void overflow(void)
{
    enum { THREADS = 64 };
    struct qpc_pager_statistics statistics;
    struct qpc_error err = { 0 };
    pthread_t threads[THREADS];

    make(4096, 0);
    require(qpc_pager_stop(pager, &err) == 0, err.message);
    for (uintptr_t i = 0; i < THREADS; i++)
        require(!pthread_create(&threads[i], NULL, touch_one, (void *)(i * 9)), "thread");
    /* All of them wait before the first answer, so that one read brings more than there is room. */
    for (unsigned blocked = 0; blocked < THREADS;) {
        char line[64];
        FILE *info;

        blocked = 0;
        snprintf(line, sizeof(line), "/proc/self/fdinfo/%d", uffd);
        info = fopen(line, "re");
        require(info != NULL, line);
        while (fgets(line, sizeof(line), info))
            if (sscanf(line, "pending: %u", &blocked) == 1)
                break;
        fclose(info);
        usleep(500);
    }
    require(qpc_pager_start(pager, &err) == 0, err.message);
    for (unsigned i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    qpc_pager_read_statistics(pager, &statistics);
    require(statistics.faults > THREADS, "some faulted twice, for there was no room");
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = { { "fill_all", fill_all }, { "touch_and_ask", touch_and_ask }, { "storm", storm },
                  { "interrupted", interrupted }, { "failing", failing },
                  { "overflow", overflow } };

    for (unsigned i = 0; argc == 2 && i < sizeof(cases) / sizeof(cases[0]); i++)
        if (!strcmp(argv[1], cases[i].name)) {
            cases[i].run();
            qpc_pager_destroy(pager);
            qpc_source_close(source);
            return 0;
        }
    fprintf(stderr, "usage: pager_test CASE\n");
    return 2;
}
