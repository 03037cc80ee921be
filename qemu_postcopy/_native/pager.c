#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pager_state.h"

#define BUSY_YIELD_NS 50000ull /* so long: somebody else needs this processor */
#define BUSY_PAUSE_FIRST_NS 10000000ull
#define BUSY_PAUSE_LAST_NS 160000000ull
#define YIELD_EVERY_NS 100000ull

/* --- waiting --------------------------------------------------------------------------------- */

/*
 * Polls for the next fault where it is likely to come soon: waking a sleeping processor costs more
 * than the fault itself (60 us against 13 on the machine this was written on). Bounded by
 * spin_limit; once per answer; not when faults come further apart than the limit; and not for a
 * while after a sched_yield() showed that somebody else needs this processor.
 */
static int spin(struct qpc_pager *p, uint64_t until_ns)
{
    uint64_t begin = now_ns(), now = begin, budget;
    unsigned faults;

    if (!p->spin_limit_ns || !p->spin_armed || begin < p->no_spin_before_ns ||
        p->gap_ns > p->spin_limit_ns)
        return 0;
    budget = min_u64(4 * p->gap_ns + 20000, p->spin_limit_ns);
    while (now - begin < budget && now < until_ns && !stop_wanted(p)) {
        if (qpc_pager_read_messages(p, &faults) || faults) {
            COUNT(p->statistics.spins_hit, 1u);
            p->gap_ns = (7 * p->gap_ns + (now_ns() - p->answered_ns)) / 8;
            return 1;
        }
        now = now_ns();
        if (now - p->gave_way_ns > YIELD_EVERY_NS) {
            sched_yield();
            p->gave_way_ns = now_ns();
            if (p->gave_way_ns - now > BUSY_YIELD_NS) {
                p->no_spin_before_ns = p->gave_way_ns + p->busy_pause_ns;
                p->busy_pause_ns = min_u64(2 * p->busy_pause_ns, BUSY_PAUSE_LAST_NS);
                break;
            }
            p->busy_pause_ns = BUSY_PAUSE_FIRST_NS;
            now = p->gave_way_ns;
        }
    }
    p->spin_armed = 0;
    COUNT(p->statistics.spins_missed, 1u);
    return 0;
}

static void sleep_until(struct qpc_pager *p, uint64_t due_ns)
{
    struct pollfd fds[2] = {
        { .fd = p->uffd, .events = POLLIN },
        { .fd = p->stop_fd, .events = POLLIN },
    };
    uint64_t now = now_ns();
    struct timespec timeout = { 0 };

    if (due_ns != UINT64_MAX && due_ns > now) {
        timeout.tv_sec = (time_t)((due_ns - now) / 1000000000ull);
        timeout.tv_nsec = (long)((due_ns - now) % 1000000000ull);
    }
    p->gave_way_ns = now;
    if (ppoll(fds, 2, due_ns == UINT64_MAX ? NULL : &timeout, NULL) > 0) {
        if (fds[1].revents) {
            uint64_t kicks;
            ssize_t n = read(p->stop_fd, &kicks, sizeof(kicks));
            (void)n;
        }
        if ((fds[0].revents & POLLIN) && p->answered_ns) {
            uint64_t gap = min_u64(now_ns() - p->answered_ns, 4 * p->spin_limit_ns + 1);
            p->gap_ns = (3 * p->gap_ns + gap) / 4;
        }
        if (fds[0].revents & (POLLERR | POLLHUP | POLLNVAL)) {
            /* POLLERR: the descriptor is blocking, or was never initialised. */
            SET(p->statistics.state, QPC_PAGER_MAPPER_GONE);
            qpc_pager_notify(p);
        }
    }
}

static void *pager_thread(void *argument)
{
    struct qpc_pager *p = argument;

    pthread_setname_np(pthread_self(), "qpc-pager");
    prctl(PR_SET_TIMERSLACK, 1); /* of this thread, ns; 50 us otherwise, PR_SET_TIMERSLACK(2const) */
    p->random = (uint32_t)now_ns() | 1u;
    atomic_store_explicit(&p->thread_id, (int)syscall(SYS_gettid), memory_order_relaxed);
    p->background_refill_ns = p->background_filled_ns = p->gave_way_ns = now_ns();
    while (!stop_wanted(p) && GET(p->statistics.state) != QPC_PAGER_MAPPER_GONE) {
        uint64_t due, background_due = UINT64_MAX;
        unsigned faults;

        due = qpc_pager_serve_queue(p);
        qpc_pager_check_complete(p);
        qpc_pager_read_messages(p, &faults);
        if (faults || (due && due <= now_ns()))
            continue;
        if (qpc_pager_fill_ahead(p))
            continue;
        if (atomic_load_explicit(&p->background, memory_order_relaxed)) {
            background_due = qpc_pager_fill_background(p);
            if (background_due == 0)
                continue;
        }
        due = due ? min_u64(due, background_due) : background_due;
        qpc_pager_leave_windows(p);
        if (!spin(p, due))
            sleep_until(p, due);
    }
    atomic_store_explicit(&p->thread_id, 0, memory_order_relaxed);
    return NULL;
}

/* --- life cycle ------------------------------------------------------------------------------ */

static int check_block(const struct qpc_pager_block *b, uint32_t index, struct qpc_error *err)
{
    uint64_t size = b->page_size;

    if (size < 4096 || (size & (size - 1)) || size > (1ull << 30))
        return qpc_error_set(err, QPC_INVALID, 0, "block %u: bad page size %llu", index,
                             (unsigned long long)size);
    if (!b->length || b->length % size || b->address % size || b->address + b->length < b->address)
        return qpc_error_set(err, QPC_INVALID, 0, "block %u: address or length is not page-aligned",
                             index);
    if (!b->source || !b->data_bitmap || !b->ledger)
        return qpc_error_set(err, QPC_INVALID, 0, "block %u: no source, bitmap or ledger", index);
    return 0;
}

static void *allocate_pages(uint64_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return memory == MAP_FAILED ? NULL : memory;
}

static void count_pages(struct qpc_pager *p)
{
    for (uint32_t i = 0; i < p->block_count; i++) {
        struct block *b = &p->blocks[i];
        uint64_t data = 0, missing = 0, removed = 0, unmapped = 0;

        for (uint64_t page = 0; page < b->page_count; page++) {
            uint8_t state = page_state(b, page);

            /* A page that was about to be filled when a pager ended: tried again, EEXIST tells. */
            if (state == QPC_PAGE_FILLING) {
                __atomic_store_n(&b->is.ledger[page], QPC_PAGE_MISSING, __ATOMIC_RELAXED);
                state = QPC_PAGE_MISSING;
                p->unsettled++;
            }
            removed += state == QPC_PAGE_REMOVED || state == QPC_PAGE_RETURNED;
            unmapped += state == QPC_PAGE_UNMAPPED;
            if (has_data(b, page)) {
                data++;
                missing += state == QPC_PAGE_MISSING;
            }
        }
        COUNT(p->statistics.pages_total, b->page_count);
        COUNT(p->statistics.pages_data, data);
        COUNT(p->statistics.pages_data_missing, missing);
        COUNT(p->statistics.pages_removed, removed);
        SET(b->account.pages_data, data);
        SET(b->account.pages_data_missing, missing);
        SET(b->account.pages_removed, removed);
        SET(b->account.pages_unmapped, unmapped);
    }
}

struct qpc_pager *qpc_pager_create(const struct qpc_pager_options *options,
                                   const struct qpc_pager_block *blocks, uint32_t block_count,
                                   struct qpc_error *err)
{
    uint64_t chunk = options->chunk_size, largest_page = 0;
    struct qpc_pager *p;

    if (chunk < 4096 || chunk > (2u << 20) || (chunk & (chunk - 1))) {
        qpc_error_set(err, QPC_INVALID, 0,
                      "chunk size %llu is not a power of two from 4 KiB to 2 MiB",
                      (unsigned long long)chunk);
        return NULL;
    }
    if (!block_count) {
        qpc_error_set(err, QPC_INVALID, 0, "no block to serve");
        return NULL;
    }
    for (uint32_t i = 0; i < block_count; i++) {
        if (check_block(&blocks[i], i, err) < 0)
            return NULL;
        if (blocks[i].page_size > largest_page)
            largest_page = blocks[i].page_size;
    }
    p = calloc(1, sizeof(*p) + block_count * sizeof(p->blocks[0]));
    if (!p) {
        qpc_error_set(err, QPC_SYSTEM, ENOMEM, "no memory for the pager");
        return NULL;
    }
    p->stop_fd = p->notify_fd = -1;
    p->uffd = options->userfaultfd;
    p->chunk_size = chunk;
    p->spin_limit_ns = options->spin_limit_us * 1000ull;
    p->noting_first_faults = options->note_first_faults;
    p->block_count = block_count;
    p->busy_pause_ns = BUSY_PAUSE_FIRST_NS;
    atomic_init(&p->background, options->background);
    atomic_init(&p->background_rate, options->background_rate);
    for (uint32_t i = 0; i < block_count; i++) {
        p->blocks[i].is = blocks[i];
        p->blocks[i].page_shift = (uint32_t)__builtin_ctzll(blocks[i].page_size);
        p->blocks[i].page_count = blocks[i].length >> p->blocks[i].page_shift;
    }
    p->buffer_size = chunk > QPC_PAGER_BACKGROUND_UNIT ? chunk : QPC_PAGER_BACKGROUND_UNIT;
    if (p->buffer_size < largest_page)
        p->buffer_size = largest_page;
    p->buffer = allocate_pages(p->buffer_size);
    if (!options->journal)
        p->own_messages = calloc(1, QPC_PAGER_JOURNAL_SIZE);
    p->messages = options->journal ? options->journal : p->own_messages;
    p->queue = calloc(QPC_PAGER_QUEUE_LENGTH, sizeof(*p->queue));
    p->first_faults = calloc(QPC_PAGER_FIRST_FAULTS, sizeof(*p->first_faults));
    p->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (largest_page > 4096)
        p->zeros = allocate_pages(largest_page);
    if (!p->buffer || !p->queue || !p->messages || !p->first_faults || p->stop_fd < 0 || p->notify_fd < 0 ||
        (largest_page > 4096 && !p->zeros)) {
        qpc_error_set(err, QPC_SYSTEM, errno, "no memory or descriptors for the pager");
        qpc_pager_destroy(p);
        return NULL;
    }
    count_pages(p);
    qpc_pager_replay_journal(p);
    return p;
}

void qpc_pager_destroy(struct qpc_pager *p)
{
    uint64_t largest_page = 0;

    if (!p)
        return;
    qpc_pager_stop(p, NULL);
    for (uint32_t i = 0; i < p->block_count; i++)
        if (p->blocks[i].is.page_size > largest_page)
            largest_page = p->blocks[i].is.page_size;
    if (p->buffer)
        munmap(p->buffer, p->buffer_size);
    if (p->zeros)
        munmap(p->zeros, largest_page);
    if (p->stop_fd >= 0)
        close(p->stop_fd);
    if (p->notify_fd >= 0)
        close(p->notify_fd);
    free(p->own_messages);
    free(p->queue);
    free(p->prefetch);
    free(p->first_faults);
    free(p);
}

int qpc_pager_start(struct qpc_pager *p, struct qpc_error *err)
{
    int result;

    if (p->started)
        return qpc_error_set(err, QPC_INVALID, 0, "the pager is running already");
    if (GET(p->statistics.state) == QPC_PAGER_IDLE)
        SET(p->statistics.state, GET(p->statistics.complete_ns) ? QPC_PAGER_COMPLETE
                                                                : QPC_PAGER_SERVING);
    if (!GET(p->statistics.started_ns))
        SET(p->statistics.started_ns, now_ns());
    atomic_store(&p->stop, 0);
    result = pthread_create(&p->thread, NULL, pager_thread, p);
    if (result)
        return qpc_error_set(err, QPC_SYSTEM, result, "cannot start the pager thread");
    p->started = 1;
    return 0;
}

static void kick(struct qpc_pager *p)
{
    uint64_t one = 1;
    ssize_t n = write(p->stop_fd, &one, sizeof(one));

    (void)n; /* EAGAIN: it is readable already */
}

int qpc_pager_stop(struct qpc_pager *p, struct qpc_error *err)
{
    int result;

    if (!p->started)
        return 0;
    atomic_store(&p->stop, 1);
    kick(p);
    for (uint32_t i = 0; i < p->block_count; i++)
        qpc_source_cancel(p->blocks[i].is.source, 1);
    result = pthread_join(p->thread, NULL);
    for (uint32_t i = 0; i < p->block_count; i++)
        qpc_source_cancel(p->blocks[i].is.source, 0);
    if (result)
        return qpc_error_set(err, QPC_SYSTEM, result, "cannot join the pager thread");
    p->started = 0;
    if (GET(p->statistics.state) != QPC_PAGER_MAPPER_GONE)
        SET(p->statistics.state, QPC_PAGER_IDLE);
    return 0;
}

void qpc_pager_set_background(struct qpc_pager *p, int background, uint64_t rate)
{
    atomic_store_explicit(&p->background_rate, rate, memory_order_relaxed);
    atomic_store_explicit(&p->background, background, memory_order_relaxed);
    kick(p);
}

void qpc_pager_read_statistics(const struct qpc_pager *p, struct qpc_pager_statistics *ret)
{
    const _Atomic uint64_t *from = (const _Atomic uint64_t *)&p->statistics;
    uint64_t *to = (uint64_t *)ret;

    _Static_assert(sizeof(p->statistics) == sizeof(*ret) &&
                       offsetof(struct qpc_pager, statistics.failing) -
                               offsetof(struct qpc_pager, statistics) ==
                           offsetof(struct qpc_pager_statistics, failing),
                   "the two lists of counters must match");
    for (size_t i = 0; i < offsetof(struct qpc_pager_statistics, timeline) / sizeof(*to); i++)
        to[i] = atomic_load_explicit(&from[i], memory_order_relaxed);
    for (size_t i = 0; i < sizeof(ret->timeline) / sizeof(ret->timeline[0]); i++)
        ret->timeline[i] = atomic_load_explicit(&p->statistics.timeline[i], memory_order_relaxed);
}

int qpc_pager_notify_fd(const struct qpc_pager *p)
{
    return p->notify_fd;
}

int qpc_pager_thread_id(const struct qpc_pager *p)
{
    return atomic_load_explicit(&p->thread_id, memory_order_relaxed);
}
