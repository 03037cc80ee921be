/* The idle guest: ticks every qpc.tick_ms (default 50) and does nothing else. */
#include <unistd.h>

#include "options.h"
#include "report.h"

int main(void)
{
	unsigned int tick_ms = (unsigned int)option_number("tick_ms", 50, 1, 60000);

	report_ready(0, 0, 0);
	report_start_ticker(tick_ms);
	for (;;)
		pause();
}
