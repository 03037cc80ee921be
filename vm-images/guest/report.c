#include "report.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "pattern.h"

enum { BAD_LINES_LIMIT = 64 };

struct progress progress = { .kind = "tick" };

/* Held while a line is numbered and written, so that numbers appear in order. */
static pthread_mutex_t console_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t line_number;
static uint64_t reported_pages;
static unsigned int bad_lines;

uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

void sleep_until_ns(uint64_t deadline_ns)
{
	struct timespec deadline = {
		.tv_sec = (time_t)(deadline_ns / 1000000000ull),
		.tv_nsec = (long)(deadline_ns % 1000000000ull),
	};

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &deadline, NULL) == EINTR)
		;
}

static void write_line(const char *line, int length)
{
	while (length > 0) {
		ssize_t written = write(STDOUT_FILENO, line, (size_t)length);
		if (written < 0 && errno == EINTR)
			continue;
		if (written <= 0)
			_exit(1); /* without a console there is nobody to tell */
		line += written;
		length -= (int)written;
	}
}

static unsigned long long count(_Atomic uint64_t *counter)
{
	return atomic_load_explicit(counter, memory_order_relaxed);
}

void report_progress(void)
{
	char line[256], touched[48] = "";

	pthread_mutex_lock(&console_lock);
	unsigned long long pages = count(&progress.pages);
	if (!strcmp(progress.kind, "walk"))
		snprintf(touched, sizeof(touched), "touched=%llu ", pages - reported_pages);
	reported_pages = pages;
	int length = snprintf(line, sizeof(line),
			      "QPC %s=%llu pass=%llu generation=%llu %spages=%llu bad=%llu "
			      "time_ms=%llu\n",
			      progress.kind, (unsigned long long)++line_number,
			      count(&progress.passes), count(&progress.generation), touched, pages,
			      count(&progress.bad_words),
			      (unsigned long long)(now_ns() / 1000000));
	write_line(line, length);
	pthread_mutex_unlock(&console_lock);
}

static void *tick_for_ever(void *argument)
{
	uint64_t interval_ns = *(const uint64_t *)argument;
	uint64_t deadline_ns = now_ns();

	for (;;) {
		deadline_ns += interval_ns;
		uint64_t now = now_ns();
		if (now > deadline_ns)
			deadline_ns = now; /* late: go on from here, do not catch up in a burst */
		else
			sleep_until_ns(deadline_ns);
		report_progress();
	}
	return NULL;
}

void report_start_ticker(unsigned int interval_ms)
{
	static uint64_t interval_ns;
	pthread_t thread;

	interval_ns = interval_ms * 1000000ull;
	int error = pthread_create(&thread, NULL, tick_for_ever, &interval_ns);
	if (error)
		report_failure("cannot start the ticker: %s", strerror(error));
}

void report_ready(uint64_t fill_mib, uint64_t pages, uint64_t zero_pages)
{
	char line[160];
	int length = snprintf(line, sizeof(line),
			      "QPC ready fill=%llu pages=%llu zero=%llu time_ms=%llu\n",
			      (unsigned long long)fill_mib, (unsigned long long)pages,
			      (unsigned long long)zero_pages,
			      (unsigned long long)(now_ns() / 1000000));
	write_line(line, length);
}

void report_bad_page(uint64_t page_index, uint64_t generation, uint64_t seed, int zero,
		     const uint64_t *page)
{
	uint64_t bad_words = 0;

	pthread_mutex_lock(&console_lock);
	for (unsigned int i = 0; i < PAGE_WORDS; i++) {
		uint64_t want = expected_word(seed, zero, i);
		uint64_t got = ((const volatile uint64_t *)page)[i];
		if (want == got)
			continue;
		bad_words++;
		if (bad_lines >= BAD_LINES_LIMIT)
			continue;
		bad_lines++;
		char line[192];
		int length = snprintf(line, sizeof(line),
				      "QPC BAD page=%llu word=%u generation=%llu want=%016llx "
				      "got=%016llx\n",
				      (unsigned long long)page_index, i,
				      (unsigned long long)generation, (unsigned long long)want,
				      (unsigned long long)got);
		write_line(line, length);
	}
	/* A page that was wrong a moment ago and is right now was wrong all the same. */
	atomic_fetch_add_explicit(&progress.bad_words, bad_words ? bad_words : 1,
				  memory_order_relaxed);
	pthread_mutex_unlock(&console_lock);
}

void report_failure(const char *format, ...)
{
	char reason[256], line[288];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(reason, sizeof(reason), format, arguments);
	va_end(arguments);
	write_line(line, snprintf(line, sizeof(line), "QPC FAIL %s\n", reason));
	_exit(1);
}
