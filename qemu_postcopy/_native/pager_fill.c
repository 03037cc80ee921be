#include <errno.h>
#include <string.h>

#include "pager_state.h"
#include "uffd.h"

#define MERGED_ZEROS 8 /* pages */

static void note_error(struct qpc_pager *p, const struct block *b, uint64_t page, int errnum)
{
    SET(p->statistics.last_error, (uint64_t)errnum);
    SET(p->statistics.last_error_block, (uint64_t)(b - p->blocks));
    SET(p->statistics.last_error_page, page);
}

void qpc_pager_note_no_memory(struct qpc_pager *p, const struct block *b, uint64_t page)
{
    COUNT(p->statistics.fill_errors, 1u);
    note_error(p, b, page, ENOMEM);
}

void qpc_pager_wake(struct qpc_pager *p, uint64_t start, uint64_t length)
{
    COUNT(p->statistics.wakes, 1u);
    qpc_uffd_wake(p->uffd, start, length, NULL);
}

void qpc_pager_wake_filled(struct qpc_pager *p)
{
    for (uint32_t i = 0; i < p->wake_count; i++)
        qpc_uffd_wake(p->uffd, p->wakes[i].start, p->wakes[i].length, NULL);
    p->wake_count = 0;
}

static void wake_afterwards(struct qpc_pager *p, uint64_t start, uint64_t length)
{
    if (p->wake_count == QPC_PAGER_BATCH)
        qpc_pager_wake_filled(p);
    p->wakes[p->wake_count].start = start;
    p->wakes[p->wake_count++].length = length;
}

void qpc_pager_note_reading(struct qpc_pager *p, const struct block *b, uint64_t page,
                            uint64_t since_ns)
{
    SET(p->statistics.reading_block, (uint64_t)(b - p->blocks));
    SET(p->statistics.reading_page, page);
    SET(p->statistics.reading_since_ns, since_ns);
}

void qpc_pager_note_read(struct qpc_pager *p, const struct block *b, uint64_t first, uint64_t last,
                         uint8_t *buffer)
{
    COUNT(p->statistics.bytes_read, (last - first) << b->page_shift);
    for (uint64_t page = first; page < last; page++)
        if (!has_data(b, page))
            memset(buffer + ((page - first) << b->page_shift), 0, b->is.page_size);
}

int qpc_pager_read_source(struct qpc_pager *p, const struct block *b, uint64_t first,
                          uint64_t last)
{
    int errnum;

    qpc_pager_note_reading(p, b, first, now_ns());
    errnum = qpc_source_read(b->is.source, b->is.source_offset + (first << b->page_shift),
                             (last - first) << b->page_shift, p->buffer);
    SET(p->statistics.reading_since_ns, 0);
    if (!errnum)
        qpc_pager_note_read(p, b, first, last, p->buffer);
    return errnum;
}

enum fill qpc_pager_note_source_error(struct qpc_pager *p, const struct block *b, uint64_t page,
                                      int errnum)
{
    if (errnum == ECANCELED && stop_wanted(p))
        return FILL_LATER; /* ours: qpc_pager_stop() */
    COUNT(p->statistics.source_errors, 1u);
    note_error(p, b, page, errnum);
    return FILL_LATER;
}

/*
 * Of a page that was to be filled and was there: nobody else fills, and all memory was empty at first
 * (vm/emptiness.py), so another process that maps this memory has touched it, for which the kernel
 * made a page of zeros without asking us.
 */
static void note_foreign(struct qpc_pager *p, const struct block *b, uint64_t page)
{
    if (p->unsettled) {
        p->unsettled--;
        return;
    }
    if (!GET(p->statistics.pages_foreign)) {
        SET(p->statistics.foreign_block, (uint64_t)(b - p->blocks));
        SET(p->statistics.foreign_page, page);
        COUNT(p->statistics.pages_foreign, 1u);
        qpc_pager_notify(p);
        return;
    }
    COUNT(p->statistics.pages_foreign, 1u);
}

/*
 * Fills [page, page+count) with the buffer (data) or with zeros. Pages are FILLING on entry for
 * data; for zeros `final` is the state they get.
 */
static enum fill fill_pages(struct qpc_pager *p, struct block *b, uint64_t page, uint64_t count,
                            const uint8_t *data, uint8_t final)
{
    uint64_t page_size = b->is.page_size;
    uint64_t end = page + count;

    while (page < end) {
        uint64_t address = b->is.address + (page << b->page_shift);
        uint64_t length = (end - page) << b->page_shift;
        uint64_t done = 0, pages_done;
        enum qpc_outcome outcome;

        if (data)
            outcome = qpc_uffd_copy(p->uffd, address, data, length, !p->wake_later, &done);
        else if (!p->zeros || page_size == 4096)
            outcome = qpc_uffd_zeropage(p->uffd, address, length, &done);
        else
            outcome = qpc_uffd_copy(p->uffd, address, p->zeros, page_size, 1, &done);

        pages_done = done >> b->page_shift;
        qpc_pager_set_pages(p, b, page, pages_done, final);
        if (data && done && p->wake_later)
            wake_afterwards(p, address, done);
        page += pages_done;
        if (data)
            data += done;
        else
            COUNT(p->statistics.pages_zero, pages_done);

        switch (outcome) {
        case QPC_FILLED:
            continue;
        case QPC_RETRY:
            if (pages_done)
                continue;
            COUNT(p->statistics.retries, 1u);
            return FILL_EVENT_FIRST;
        case QPC_ALREADY_PRESENT:
            /*
             * Where no huge page is free, COPY says EEXIST too, not ENOMEM (seen on Linux 6.18). Of a
             * page that was never filled here it can mean nothing else: all memory was empty, and
             * what arrived from a pager before us was noted, where that could be asked. To take it
             * for present would have the next fault answered with zeros.
             */
            if (page_size > 4096 && page_state(b, page) != QPC_PAGE_PRESENT &&
                page_state(b, page) != QPC_PAGE_REMOVED) {
                qpc_pager_note_no_memory(p, b, page);
                return FILL_LATER;
            }
            if (page_size > 4096)
                return FILL_DOUBTFUL;
            /* Somebody was quicker, or a second message for a page that is there. */
            COUNT(p->statistics.already_present, 1u);
            if (data && has_data(b, page))
                note_foreign(p, b, page);
            if (page_state(b, page) != QPC_PAGE_REMOVED)
                qpc_pager_set_pages(p, b, page, 1, QPC_PAGE_PRESENT);
            qpc_pager_wake(p, b->is.address + (page << b->page_shift), page_size);
            page++;
            if (data)
                data += page_size;
            continue;
        case QPC_TARGET_GONE:
            if (GET(p->statistics.state) != QPC_PAGER_MAPPER_GONE) {
                SET(p->statistics.state, QPC_PAGER_MAPPER_GONE);
                qpc_pager_notify(p);
            }
            return FILL_GONE;
        case QPC_NOT_REGISTERED:
            /* The range may cross a border inside the mapping (madvise splits it): page by page. */
            if (page + 1 < end) {
                enum fill one = fill_pages(p, b, page, 1, data, final);

                if (one != FILL_DONE)
                    return one;
                page++;
                if (data)
                    data += page_size;
                continue;
            }
            /* Not unmapped, as far as was told: an error like any other. */
            COUNT(p->statistics.fill_errors, 1u);
            note_error(p, b, page, ENOENT);
            return FILL_LATER;
        case QPC_FAILED:
            COUNT(p->statistics.fill_errors, 1u);
            note_error(p, b, page, errno);
            return FILL_LATER;
        }
    }
    return FILL_DONE;
}

/* What a page gets; up to KIND_ZERO it is missing. */
enum kind { KIND_DATA, KIND_ZERO, KIND_REMOVED, KIND_PRESENT, KIND_NOT_OURS };

static enum kind page_kind(const struct block *b, uint64_t page)
{
    switch (page_state(b, page)) {
    case QPC_PAGE_PRESENT:
        return KIND_PRESENT;
    case QPC_PAGE_REMOVED:
        return KIND_REMOVED;
    case QPC_PAGE_UNMAPPED:
    case QPC_PAGE_RETURNED:
        return KIND_NOT_OURS;
    default:
        return has_data(b, page) ? KIND_DATA : KIND_ZERO;
    }
}

enum fill qpc_pager_copy_run(struct qpc_pager *p, struct block *b, uint64_t first, uint64_t last,
                             const uint8_t *buffer, _Atomic uint64_t *counter)
{
    enum fill result;

    qpc_pager_set_pages(p, b, first, last - first, QPC_PAGE_FILLING);
    result = fill_pages(p, b, first, last - first, buffer, QPC_PAGE_PRESENT);
    if (result == FILL_DONE) {
        uint64_t data = 0;

        for (uint64_t page = first; page < last; page++)
            data += (uint64_t)has_data(b, page);
        COUNT(*counter, data);
        COUNT(p->statistics.pages_zero, last - first - data);
        return result;
    }
    for (uint64_t page = first; page < last; page++)
        if (page_state(b, page) == QPC_PAGE_FILLING)
            qpc_pager_set_pages(p, b, page, 1, QPC_PAGE_MISSING);
    return result;
}

/* The run of missing zero pages around `page`, within [*first, *last). */
static void find_zero_run(const struct block *b, uint64_t page, uint64_t *first, uint64_t *last)
{
    uint64_t from = page, to = page + 1;

    while (from > *first && page_kind(b, from - 1) == KIND_ZERO)
        from--;
    while (to < *last && page_kind(b, to) == KIND_ZERO)
        to++;
    *first = from;
    *last = to;
}

int qpc_pager_find_data_run(const struct block *b, uint64_t page, uint64_t chunk_pages,
                            uint64_t *first, uint64_t *last)
{
    uint64_t from = page, to = page, zeros = 0;

    *first = page & ~(chunk_pages - 1);
    *last = min_u64(*first + chunk_pages, b->page_count);
    if (page_kind(b, page) > KIND_ZERO)
        return 0;
    for (uint64_t i = page; i < *last && page_kind(b, i) <= KIND_ZERO && zeros <= MERGED_ZEROS; i++) {
        zeros = has_data(b, i) ? 0 : zeros + 1;
        if (!zeros)
            to = i + 1;
    }
    zeros = 0;
    for (uint64_t i = page; page_kind(b, i) <= KIND_ZERO && zeros <= MERGED_ZEROS; i--) {
        zeros = has_data(b, i) ? 0 : zeros + 1;
        if (!zeros)
            from = i;
        if (i == *first)
            break;
    }
    if (!has_data(b, page) && (to == page || from == page))
        return 0; /* at the edge of the data, or away from it */
    *first = from;
    *last = to;
    return 1;
}

uint64_t qpc_pager_data_run_end(const struct block *b, uint64_t page, uint64_t last)
{
    while (page < last && page_kind(b, page) == KIND_DATA)
        page++;
    return page;
}

enum fill qpc_pager_fill_around(struct qpc_pager *p, struct block *b, uint64_t page,
                                uint64_t chunk_pages, _Atomic uint64_t *counter)
{
    enum kind kind = page_kind(b, page);
    uint64_t first, last;
    enum fill result;
    int errnum;

    if (qpc_pager_find_data_run(b, page, chunk_pages, &first, &last))
        kind = KIND_DATA;
    switch (kind) {
    case KIND_DATA:
        errnum = qpc_pager_read_source(p, b, first, last);
        if (errnum && has_data(b, page)) {
            /* The page itself may be readable all the same. */
            first = page;
            last = page + 1;
            errnum = qpc_pager_read_source(p, b, first, last);
            if (errnum)
                return qpc_pager_note_source_error(p, b, page, errnum);
        }
        if (errnum) /* known to be zero: needs no source */
            result = fill_pages(p, b, page, 1, NULL, QPC_PAGE_PRESENT);
        else
            result = qpc_pager_copy_run(p, b, first, last, p->buffer, counter);
        break;
    case KIND_ZERO:
        find_zero_run(b, page, &first, &last);
        result = fill_pages(p, b, first, last - first, NULL, QPC_PAGE_PRESENT);
        break;
    case KIND_NOT_OURS:
        /* Something else may lie there by now, under another userfaultfd: COPY would not ask. */
        return FILL_GONE;
    default:
        /*
         * Removed; or filled once and faulting again: then the guest removed it in a way that
         * sends no event (hole punched in the memfd), unless it turns out to be there.
         */
        last = page + 1;
        result = fill_pages(p, b, page, 1, NULL, QPC_PAGE_REMOVED);
    }
    if (result == FILL_DONE)
        b->cursor = last;
    return result;
}
