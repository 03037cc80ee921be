/* The lines that the guest writes on its console, and the thread that writes them steadily.
 *
 *   QPC ready fill=MiB pages=N zero=N time_ms=T
 *   QPC tick=N pass=N generation=N pages=N bad=N time_ms=T
 *   QPC walk=N pass=N generation=N touched=N pages=N bad=N time_ms=T
 *   QPC BAD page=N word=N generation=N want=HEX got=HEX
 *   QPC FAIL reason
 *
 * A line goes out in one write.  Counters are relaxed atomics: the ticker only reads them.
 */
#ifndef QPC_REPORT_H
#define QPC_REPORT_H

#include <stdatomic.h>
#include <stdint.h>

struct progress {
	const char *kind;              /* "tick" or "walk" */
	_Atomic uint64_t passes;       /* finished */
	_Atomic uint64_t generation;   /* that the pass under way expects to find */
	_Atomic uint64_t pages;        /* verified since ready */
	_Atomic uint64_t bad_words;    /* found since ready */
};

extern struct progress progress;

/* Starts the thread that reports every `interval_ms` of guest time; it touches its own stack, this
 * code and `progress`, and nothing of the checked memory. */
void report_start_ticker(unsigned int interval_ms);

/* Reports now, from any thread. */
void report_progress(void);

void report_ready(uint64_t fill_mib, uint64_t pages, uint64_t zero_pages);

/* One line for each wrong word of a page, up to a limit for the guest's life; counts them all. */
void report_bad_page(uint64_t page_index, uint64_t generation, uint64_t seed, int zero,
		     const uint64_t *page);

/* Says why and ends the program, which ends the guest when it is the first process. */
_Noreturn void report_failure(const char *format, ...) __attribute__((format(printf, 1, 2)));

uint64_t now_ns(void);
void sleep_until_ns(uint64_t deadline_ns);

#endif
