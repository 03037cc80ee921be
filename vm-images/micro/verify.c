/* One task for each CPU, which fills and then verifies AREA for ever; ring 0 verifies RING0_AREA.
 *
 * After each pass one line goes to the serial port. Nothing is ever repaired: a bad word is counted
 * in each pass. Two CPUs go through AREA side by side: neither touches a page before both are there.
 */
#include "micro.h"

/* Until the other CPU, if there is one, has come to this place too: in each pass one before every
 * page, and two at the end. */
static void meet(u64 number, u64 place)
{
	volatile u64 *places = (volatile u64 *)PLACES;

	places[number] = place;
	while (CPUS > 1 && places[1 - number] < place)
		__asm__ volatile("pause");
}

static u64 verify_together(u64 number, u64 pass)
{
	u64 pages = AREA_WORDS / PAGE_WORDS;
	u64 bad = 0;

	for (u64 page = 0; page < pages; page++) {
		meet(number, pass * (pages + 2) + page);
		bad += verify(AREA + page * 4096, PAGE_WORDS);
	}
	shared()->tasks[number].bad = bad;
	meet(number, pass * (pages + 2) + pages);
	return bad;
}

static void report(u64 pass, u64 bad, u64 bad_ring0)
{
	char line[128];
	u64 at = put_text(line, 0, "micro pass ");

	at = put_number(line, at, pass);
	at = put_text(line, at, " bad ");
	at = put_number(line, at, bad);
	at = put_text(line, at, " ");
	at = put_number(line, at, bad_ring0);
	at = put_text(line, at, "\n");
	call(CALL_PRINT, line, at);
}

void run_verifier(u64 number)
{
	volatile struct task *other = &shared()->tasks[1];
	char line[128];
	u64 at;

	if (!number) {
		fill(AREA, AREA_WORDS);
		call(CALL_FILL, 0, 0);
		at = put_text(line, 0, "micro ready ");
		at = put_number(line, at, AREA_WORDS);
		at = put_text(line, at, " ");
		at = put_number(line, at, RING0_WORDS);
		at = put_text(line, at, "\n");
		call(CALL_PRINT, line, at);
	}
	for (u64 pass = 1;; pass++) {
		u64 bad = verify_together(number, pass);
		if (!number)
			report(pass, bad + (CPUS > 1 ? other->bad : 0), call(CALL_VERIFY, 0, 0));
		meet(number, pass * (AREA_WORDS / PAGE_WORDS + 2) + AREA_WORDS / PAGE_WORDS + 1);
	}
}
