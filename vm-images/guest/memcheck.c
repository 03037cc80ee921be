/* The memory checker: fills qpc.fill MiB (default 64), then verifies every page in turn for ever,
 * rewriting each with the next generation (unless qpc.rewrite=0).  qpc.zero=PERCENT of the pages
 * are zero.  Reports every qpc.tick_ms (default 50) and at the end of every pass. */
#include "area.h"
#include "options.h"
#include "report.h"

int main(void)
{
	bool rewrite = option_number("rewrite", 1, 0, 1);
	unsigned int tick_ms = (unsigned int)option_number("tick_ms", 50, 1, 60000);
	unsigned int zero_percent = (unsigned int)option_number("zero", 0, 0, 100);
	struct area area = area_create(option_number("fill", 64, 1, 1 << 24), zero_percent);

	report_start_ticker(tick_ms);
	for (;;) {
		uint64_t generation = progress.generation;
		for (uint64_t i = 0; i < area.pages; i++)
			area_visit(&area, i, generation, rewrite);
		progress.generation = generation + rewrite;
		progress.passes++;
		report_progress();
	}
}
