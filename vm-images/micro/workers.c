/* Many tasks on one CPU: each worker verifies a part of AREA of its own, page by page, and lets the
 * others run in between; the speaker fills AREA and tells what all of them have done.
 */
#include "micro.h"

#define PART_BYTES (AREA_BYTES / (WORKERS ? WORKERS : 1))
#define CYCLES_BETWEEN_LINES 100000000UL

static inline u64 rdtsc(void)
{
	u32 low, high;
	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	return (u64)high << 32 | low;
}

static u64 put(char *line, u64 at, const char *name, u64 value)
{
	at = put_text(line, at, name);
	return put_number(line, at, value);
}

static void report(u64 number)
{
	volatile struct shared *s = shared();
	char line[1024];
	u64 bad = 0;
	u64 at;

	for (u64 i = 1; i < TASKS; i++)
		bad += s->tasks[i].bad;
	at = put(line, 0, "micro tasks ", number);
	at = put(line, at, " async ", s->async);
	at = put(line, at, " waiting ", s->waiting);
	at = put(line, at, " most ", s->most_waiting);
	at = put(line, at, " waits ", s->not_present);
	at = put(line, at, " bad ", bad);
	at = put_text(line, at, " passes");
	for (u64 i = 1; i < TASKS; i++)
		at = put(line, at, " ", s->tasks[i].passes);
	at = put_text(line, at, "\n");
	call(CALL_PRINT, line, at);
}

void run_speaker(u64 number)
{
	char line[128];
	u64 at, next_line = 0;

	fill(AREA, AREA_WORDS);
	at = put(line, number, "micro ready ", AREA_WORDS);
	at = put_text(line, at, " 0\n");
	call(CALL_PRINT, line, at);
	for (u64 lines = 1;;) {
		call(CALL_YIELD, 0, 0);
		if (rdtsc() < next_line)
			continue;
		report(lines++);
		next_line = rdtsc() + CYCLES_BETWEEN_LINES;
	}
}

void run_worker(u64 number)
{
	volatile struct task *task = &shared()->tasks[number];
	u64 part = AREA + (number - 1) * PART_BYTES;

	for (;;) {
		for (u64 page = 0; page < PART_BYTES / 4096; page++) {
			task->bad += verify(part + page * 4096, PAGE_WORDS);
			call(CALL_YIELD, 0, 0);
		}
		task->passes++;
	}
}
