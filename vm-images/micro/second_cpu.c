/* Starts the second CPU, and waits until it runs (Intel SDM volume 3, 9.4: INIT, then SIPI). */
#include "micro.h"

#define ICR_LOW 0x300
#define ICR_HIGH 0x310
#define INIT 0x4500u
#define STARTUP 0x4600u
#define PATIENCE 1000u

extern const u8 trampoline[], trampoline_end[];

static void send(u32 what)
{
	write_lapic(ICR_HIGH, 1u << 24); /* APIC id 1 */
	write_lapic(ICR_LOW, what);
}

void start_second_cpu(void)
{
	volatile u64 *started = &shared()->started_cpus;

	for (u64 i = 0; trampoline + i < trampoline_end; i++)
		((volatile u8 *)TRAMPOLINE)[i] = trampoline[i];
	send(INIT);
	while (!*started) {
		send(STARTUP | TRAMPOLINE >> 12);
		for (u32 i = 0; i < PATIENCE && !*started; i++)
			__asm__ volatile("pause");
	}
}
