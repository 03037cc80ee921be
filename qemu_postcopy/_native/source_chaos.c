#define _GNU_SOURCE
#include "source_chaos.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define RUBBISH 0x5a
#define TRUNCATE_BURST (1ull << 32) /* in `burst`: the reads that are left of it are cut, not failed */

struct chaos_source {
    struct qpc_source source;
    struct qpc_source *inner;
    struct qpc_chaos_schedule schedule;
    _Atomic uint64_t number;    /* of the next read */
    _Atomic uint64_t burst;     /* reads left of one that has begun */
    _Atomic uint32_t releases;  /* a futex: changes when those who are held up shall look again */
    atomic_int enabled;
    atomic_int cancelled;
    _Atomic uint64_t failed, truncated, delayed, stalled, stalled_now;
};

enum mischief { NOTHING, FAIL, TRUNCATE, DELAY, STALL };

static struct chaos_source *chaos_of(struct qpc_source *source)
{
    return (struct chaos_source *)source;
}

/* splitmix64: the n-th number of the sequence that belongs to a seed. */
static uint64_t random_number(uint64_t seed, uint64_t n)
{
    uint64_t x = seed + (n + 1) * 0x9e3779b97f4a7c15ull;

    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static uint64_t between(uint64_t first, uint64_t last, uint64_t random)
{
    return first + random % (last - first + 1);
}

static int is_meant(const struct qpc_chaos_schedule *s, uint64_t offset, uint64_t length)
{
    for (uint32_t i = 0; i < s->range_count; i++)
        if (offset < s->range_end[i] && offset + length > s->range_begin[i])
            return 1;
    return !s->range_count;
}

/* One read of a burst that has begun, if there is any. */
static enum mischief go_on_with_burst(struct chaos_source *c)
{
    uint64_t left = atomic_load(&c->burst);

    while (left & (TRUNCATE_BURST - 1))
        if (atomic_compare_exchange_weak(&c->burst, &left, left - 1))
            return left & TRUNCATE_BURST ? TRUNCATE : FAIL;
    return NOTHING;
}

static enum mischief choose(struct chaos_source *c, uint64_t random, uint64_t more)
{
    const struct qpc_chaos_schedule *s = &c->schedule;
    uint64_t part = random >> 32, burst;
    enum mischief of_burst = go_on_with_burst(c);

    if (of_burst != NOTHING)
        return of_burst;
    if (part < s->fail + s->truncate) {
        burst = between(s->burst_first, s->burst_last, more) - 1;
        atomic_store(&c->burst, burst | (part < s->fail ? 0 : TRUNCATE_BURST));
        return part < s->fail ? FAIL : TRUNCATE;
    }
    part -= s->fail + s->truncate;
    if (part < s->delay)
        return DELAY;
    return part - s->delay < s->stall ? STALL : NOTHING;
}

/* Waits so long, or until it is released or cancelled (ECANCELED). us = 0: for any time. */
static int hold_up(struct chaos_source *c, uint64_t us)
{
    uint32_t before = atomic_load(&c->releases);
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += (time_t)(us / 1000000);
    until.tv_nsec += (long)(us % 1000000) * 1000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    while (!atomic_load(&c->cancelled) && atomic_load(&c->enabled)) {
        /* FUTEX_WAIT_BITSET takes the time as a point of CLOCK_MONOTONIC, futex(2). */
        long result = syscall(SYS_futex, &c->releases, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG,
                              before, us ? &until : NULL, NULL, FUTEX_BITSET_MATCH_ANY);

        if ((result < 0 && errno == ETIMEDOUT) || atomic_load(&c->releases) != before)
            break;
    }
    return atomic_load(&c->cancelled) ? ECANCELED : 0;
}

static int chaos_read(struct qpc_source *source, uint64_t offset, uint64_t length, void *buffer)
{
    struct chaos_source *c = chaos_of(source);
    const struct qpc_chaos_schedule *s = &c->schedule;
    uint64_t number, random, more;
    enum mischief mischief = NOTHING;
    int errnum = 0;

    if (!atomic_load(&c->enabled) || !is_meant(s, offset, length))
        return qpc_source_read(c->inner, offset, length, buffer);
    number = atomic_fetch_add(&c->number, 1);
    random = random_number(s->seed, 2 * number);
    more = random_number(s->seed, 2 * number + 1);
    mischief = choose(c, random, more);
    if ((mischief == FAIL || mischief == TRUNCATE) && s->limit &&
        atomic_load(&c->failed) + atomic_load(&c->truncated) >= s->limit)
        mischief = NOTHING;
    switch (mischief) {
    case FAIL:
        atomic_fetch_add(&c->failed, 1);
        memset(buffer, RUBBISH, length);
        return s->errors[more % s->error_count];
    case TRUNCATE: {
        uint64_t kept = more % length;

        atomic_fetch_add(&c->truncated, 1);
        if (kept)
            errnum = qpc_source_read(c->inner, offset, kept, buffer);
        memset((char *)buffer + kept, RUBBISH, length - kept);
        return errnum ? errnum : ENODATA;
    }
    case DELAY:
        atomic_fetch_add(&c->delayed, 1);
        errnum = hold_up(c, between(s->delay_us_first, s->delay_us_last, more));
        break;
    case STALL:
        atomic_fetch_add(&c->stalled, 1);
        atomic_fetch_add(&c->stalled_now, 1);
        errnum = hold_up(c, between(s->stall_us_first, s->stall_us_last, more));
        atomic_fetch_sub(&c->stalled_now, 1);
        break;
    case NOTHING:
        break;
    }
    return errnum ? errnum : qpc_source_read(c->inner, offset, length, buffer);
}

static void chaos_cancel(struct qpc_source *source, int on)
{
    atomic_store(&chaos_of(source)->cancelled, on);
    if (on)
        qpc_chaos_release(source);
    qpc_source_cancel(chaos_of(source)->inner, on);
}

static void chaos_close(struct qpc_source *source)
{
    qpc_source_close(chaos_of(source)->inner);
    free(source);
}

static const struct qpc_source_operations chaos_operations = {
    chaos_read, NULL, chaos_cancel, chaos_close
};

static int are_times(uint64_t first_us, uint64_t last_us)
{
    return first_us && first_us <= last_us && last_us <= 1ull << 40;
}

struct qpc_source *qpc_source_open_chaos(struct qpc_source *inner,
                                         const struct qpc_chaos_schedule *schedule,
                                         struct qpc_error *err)
{
    const struct qpc_chaos_schedule *s = schedule;
    struct chaos_source *c;

    if (s->fail > 1ull << 32 || s->truncate > 1ull << 32 || s->delay > 1ull << 32 ||
        s->stall > 1ull << 32 || s->fail + s->truncate + s->delay + s->stall > 1ull << 32 ||
        s->error_count > QPC_CHAOS_ERRORS_MAX || s->range_count > QPC_CHAOS_RANGES_MAX ||
        (s->fail && !s->error_count) || !s->burst_first || s->burst_first > s->burst_last ||
        (s->delay && !are_times(s->delay_us_first, s->delay_us_last)) ||
        (s->stall && s->stall_us_last && !are_times(s->stall_us_first, s->stall_us_last))) {
        qpc_error_set(err, QPC_INVALID, 0, "this chaos schedule contradicts itself");
        return NULL;
    }
    for (uint32_t i = 0; i < s->error_count; i++)
        if (s->errors[i] <= 0) {
            qpc_error_set(err, QPC_INVALID, 0, "%d is not an errno", s->errors[i]);
            return NULL;
        }
    c = calloc(1, sizeof(*c));
    if (!c) {
        qpc_error_set(err, QPC_SYSTEM, ENOMEM, "no memory for a source");
        return NULL;
    }
    c->source.operations = &chaos_operations;
    c->inner = inner;
    c->schedule = *schedule;
    atomic_init(&c->enabled, 1);
    return &c->source;
}

void qpc_chaos_enable(struct qpc_source *source, int on)
{
    atomic_store(&chaos_of(source)->enabled, on);
    if (!on)
        qpc_chaos_release(source);
}

void qpc_chaos_release(struct qpc_source *source)
{
    struct chaos_source *c = chaos_of(source);

    atomic_fetch_add(&c->releases, 1);
    syscall(SYS_futex, &c->releases, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 0x7fffffff, NULL, NULL, 0);
}

void qpc_chaos_read_counts(struct qpc_source *source, struct qpc_chaos_counts *ret)
{
    struct chaos_source *c = chaos_of(source);

    ret->reads = atomic_load(&c->number);
    ret->failed = atomic_load(&c->failed);
    ret->truncated = atomic_load(&c->truncated);
    ret->delayed = atomic_load(&c->delayed);
    ret->stalled = atomic_load(&c->stalled);
    ret->stalled_now = atomic_load(&c->stalled_now);
}
