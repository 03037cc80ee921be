/* The memory walker: fills qpc.size MiB (default 64), then visits the pages in the order
 * qpc.walk=sequential|random|stride:N at qpc.rate pages per second of guest time (0: as fast as it
 * can), verifying each and, with qpc.write=1, rewriting it with the next generation.  Each pass
 * visits every page once, whatever the order.  Reports every qpc.tick_ms (default 50). */
#include <stdlib.h>
#include <string.h>

#include "area.h"
#include "options.h"
#include "pattern.h"
#include "report.h"

enum { LATE_LIMIT_NS = 100000000 };

/* The n-th page of a pass. */
struct order {
	uint64_t pages;
	uint64_t stride;       /* 1: sequential; 0: random */
	unsigned int bits;     /* random: of the power of two that covers the pages */
	uint64_t salt;         /* random: another permutation for each pass */
};

/* A bijection of [0, 2^bits): odd multipliers and shifts to the right can be undone. */
static uint64_t permute(const struct order *order, uint64_t x)
{
	uint64_t mask = (1ull << order->bits) - 1;
	unsigned int half = (order->bits + 1) / 2;

	x = (x + order->salt) & mask;
	for (int round = 0; round < 3; round++) {
		x = (x * 0xd1342543de82ef95ull) & mask;
		x ^= x >> half;
	}
	return x;
}

/* Visits in a pass: with a random order, numbers past the last page are passed over. */
static uint64_t order_length(const struct order *order)
{
	return order->stride ? order->pages : 1ull << order->bits;
}

static uint64_t order_page(const struct order *order, uint64_t n)
{
	if (!order->stride)
		return permute(order, n);
	/* Every stride-th page from 0, then from 1, and so on: the first `longer` of these rows
	 * have one page more than the others. */
	uint64_t row_pages = order->pages / order->stride;
	uint64_t longer = order->pages % order->stride;
	uint64_t in_longer = longer * (row_pages + 1);
	if (n < in_longer)
		return n / (row_pages + 1) + n % (row_pages + 1) * order->stride;
	n -= in_longer;
	return longer + n / row_pages + n % row_pages * order->stride;
}

static struct order order_from_option(uint64_t pages)
{
	const char *text = option_text("walk", "sequential");
	struct order order = { .pages = pages, .stride = 1 };

	if (!strcmp(text, "random")) {
		order.stride = 0;
		while (1ull << order.bits < pages)
			order.bits++;
	} else if (!strncmp(text, "stride:", 7)) {
		char *rest;
		order.stride = strtoull(text + 7, &rest, 10);
		if (rest == text + 7 || *rest || order.stride < 1 || order.stride > pages)
			report_failure("qpc.walk=%s: the stride must be from 1 to %llu pages", text,
				       (unsigned long long)pages);
	} else if (strcmp(text, "sequential")) {
		report_failure("qpc.walk=%s is not sequential, random or stride:N", text);
	}
	return order;
}

/* Waits until the next page is due. */
static void keep_rate(uint64_t pages_per_second)
{
	static uint64_t due_ns;
	uint64_t now = now_ns();

	if (now > due_ns + LATE_LIMIT_NS)
		due_ns = now; /* stopped or starved: do not catch up in a burst */
	else if (now < due_ns)
		sleep_until_ns(due_ns);
	due_ns += 1000000000ull / pages_per_second;
}

int main(void)
{
	bool rewrite = option_number("write", 0, 0, 1);
	uint64_t rate = option_number("rate", 0, 0, 1000000000);
	unsigned int tick_ms = (unsigned int)option_number("tick_ms", 50, 1, 60000);
	unsigned int zero_percent = (unsigned int)option_number("zero", 0, 0, 100);
	uint64_t mib = option_number("size", 64, 1, 1 << 24);
	struct order order = order_from_option(mib * 256);
	struct area area = area_create(mib, zero_percent);

	progress.kind = "walk";
	report_start_ticker(tick_ms);
	for (;;) {
		uint64_t generation = progress.generation;
		for (uint64_t n = 0; n < order_length(&order); n++) {
			uint64_t page_index = order_page(&order, n);
			if (page_index >= area.pages)
				continue;
			if (rate)
				keep_rate(rate);
			area_visit(&area, page_index, generation, rewrite);
		}
		order.salt = mix(order.salt + 1);
		progress.generation = generation + rewrite;
		progress.passes++;
		report_progress();
	}
}
