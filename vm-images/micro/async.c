/* Ring 0's side of KVM's asynchronous page faults, and the tasks that take turns.
 *
 * KVM sends #PF with a token in CR2 where a page is not there: the task waits and another one goes
 * on. 'Page ready' is an interrupt; it is acknowledged, and the task with that token may go on
 * (Documentation/virt/kvm/x86/msr.rst). Without KVM, or where QEMU does not offer it, all this does
 * nothing, and the processor itself waits for the page.
 */
#include "micro.h"

#define MSR_ASYNC 0x4b564d02u
#define MSR_ASYNC_VECTOR 0x4b564d06u
#define MSR_ASYNC_ACK 0x4b564d07u
#define ASYNC_ENABLED 1u
#define ASYNC_BY_INTERRUPT 8u
#define NOT_PRESENT 1u
#define WAKE_ALL 0xffffffffu

static volatile u32 *const flags = (volatile u32 *)ASYNC_AREA;
static volatile u32 *const ready_token = (volatile u32 *)(ASYNC_AREA + 4);

static void cpuid(u32 leaf, u32 *a, u32 *b, u32 *c, u32 *d)
{
	__asm__ volatile("cpuid" : "=a"(*a), "=b"(*b), "=c"(*c), "=d"(*d) : "a"(leaf), "c"(0));
}

static int is_offered(void)
{
	u32 a, b, c, d;

	cpuid(1, &a, &b, &c, &d);
	if (!(c >> 31 & 1)) /* no hypervisor */
		return 0;
	cpuid(0x40000000, &a, &b, &c, &d);
	if (b != 0x4b4d564b || c != 0x564b4d56 || d != 0x4d) /* "KVMKVMKVM" */
		return 0;
	cpuid(0x40000001, &a, &b, &c, &d);
	return a >> 4 & a >> 14 & 1; /* KVM_FEATURE_ASYNC_PF, KVM_FEATURE_ASYNC_PF_INT */
}

void prepare_async(void)
{
	volatile u64 *area = (volatile u64 *)ASYNC_AREA;

	if (!is_offered())
		return;
	for (int i = 0; i < 8; i++)
		area[i] = 0;
	write_lapic(0xf0, 0x1ff); /* on; spurious interrupts by vector 255, and there are none */
	wrmsr(MSR_ASYNC_VECTOR, READY_VECTOR);
	wrmsr(MSR_ASYNC, ASYNC_AREA | ASYNC_ENABLED | ASYNC_BY_INTERRUPT);
	shared()->async = 1;
}

/* What KVM says is there now; nothing where it has been taken before its interrupt came. */
static void take_ready(void)
{
	struct shared *s = shared();
	u32 token = *ready_token;

	if (!token)
		return;
	*ready_token = 0;
	wrmsr(MSR_ASYNC_ACK, 1);
	for (u64 number = 0; number < TASKS; number++) {
		struct task *task = &s->tasks[number];
		if (task->waits && (token == WAKE_ALL || task->token == token)) {
			task->waits = 0;
			s->waiting--;
		}
	}
}

/* Round and round, past those that wait. Where all do, so does the processor. */
struct task *next_task(struct task *task)
{
	u64 number = task->number;

	for (;;) {
		for (u64 tried = 0; tried < TASKS; tried++) {
			number = number + 1 < TASKS ? number + 1 : 0;
			if (!shared()->tasks[number].waits)
				return &shared()->tasks[number];
		}
		__asm__ volatile("pause");
		take_ready();
	}
}

struct task *page_not_present(struct task *task)
{
	struct shared *s = shared();
	u64 token;

	__asm__ volatile("movq %%cr2, %0" : "=r"(token));
	if (!s->async || *flags != NOT_PRESENT)
		trouble(token, task->frame.error, task->frame.rip);
	*flags = 0;
	task->waits = 1;
	task->token = token;
	s->not_present++;
	if (++s->waiting > s->most_waiting)
		s->most_waiting = s->waiting;
	return next_task(task);
}

struct task *page_ready(struct task *task)
{
	shared()->ready++;
	take_ready();
	write_lapic(0xb0, 0); /* end of interrupt */
	return task;
}
