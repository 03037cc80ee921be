/* Ring 0: sets the processor up, starts the tasks in ring 3, and does for them what they ask for. */
#include "micro.h"

#define SERIAL 0x3f8
#define DEBUG_EXIT 0xf4

static inline void out8(u16 port, u8 value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline u8 in8(u16 port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static void print_byte(u8 value)
{
	while (!(in8(SERIAL + 5) & 0x20))
		;
	out8(SERIAL, value);
}

static void print_hex(u64 value)
{
	print_byte(' ');
	for (int shift = 60; shift >= 0; shift -= 4)
		print_byte((u8)("0123456789abcdef"[value >> shift & 15]));
}

/* What should not be: three numbers (of an exception: CR2 and the two topmost words), then the end. */
void trouble(u64 first, u64 second, u64 third)
{
	static const char said[] = "micro trouble";

	for (u64 i = 0; i < sizeof(said) - 1; i++)
		print_byte((u8)said[i]);
	print_hex(first);
	print_hex(second);
	print_hex(third);
	print_byte('\n');
	out8(DEBUG_EXIT, 1);
	for (;;)
		;
}

static u64 answer(u64 number, u64 argument, u64 length)
{
	const char *text = (const char *)argument;

	switch (number) {
	case CALL_PRINT:
		for (u64 i = 0; i < length; i++)
			print_byte((u8)text[i]);
		return 0;
	case CALL_FILL:
		fill(RING0_AREA, RING0_WORDS);
		return 0;
	case CALL_VERIFY:
		return verify(RING0_AREA, RING0_WORDS);
	}
	return ~0UL;
}

static struct frame *go_on(struct task *task)
{
	*(volatile u64 *)(TSS + task->cpu * TSS_STRIDE + 4) = (u64)(&task->frame + 1);
	return &task->frame;
}

/* From start.S: a task has come into ring 0 by this vector. */
struct frame *ring0_enter(struct task *task, u64 vector)
{
	struct frame *frame = &task->frame;

	if (vector == 14)
		return go_on(page_not_present(task));
	if (vector == READY_VECTOR)
		return go_on(page_ready(task));
	frame->rip += 2; /* ud2 is how ring 3 calls: int and syscall do not work on every KVM */
	if (frame->rdi == CALL_YIELD)
		return go_on(next_task(task));
	frame->rax = answer(frame->rdi, frame->rsi, frame->rdx);
	return frame;
}

extern const char on_ud2[], on_page_fault[], on_ready[], on_trouble[];

static void set_gate(u64 vector, u64 handler)
{
	volatile u64 *gate = (volatile u64 *)(IDT + vector * 16);
	gate[0] = (handler & 0xffff) | 0x18UL << 16 | 0x8eUL << 40 | (handler >> 16 & 0xffff) << 48;
	gate[1] = handler >> 32;
}

static void prepare_task(u64 number)
{
	struct task *task = &shared()->tasks[number];

	task->number = number;
	task->cpu = WORKERS ? 0 : number;
	task->ring0_stack = RING0_STACK_END - task->cpu * RING0_STACK_BYTES;
	task->frame.cs = CODE3;
	task->frame.ss = DATA3;
	task->frame.rflags = RING3_FLAGS;
	task->frame.rsp = RING3_STACKS + (number + 1) * 4096 - 8;
	task->frame.rdi = number;
	task->frame.rip = (u64)(!WORKERS ? run_verifier : number ? run_worker : run_speaker);
}

/* From start.S, once on each CPU: the frame of its first task. */
struct frame *ring0_main(u64 cpu)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) idt = {0xfff, IDT};

	if (!cpu) {
		volatile u64 *at = (volatile u64 *)SHARED;
		while ((u64)at < (u64)&shared()->tasks[TASKS])
			*at++ = 0;
		for (u64 vector = 0; vector < 32; vector++)
			set_gate(vector, (u64)on_trouble);
		set_gate(6, (u64)on_ud2);
		set_gate(14, (u64)on_page_fault);
		set_gate(READY_VECTOR, (u64)on_ready);
		out8(0x21, 0xff); /* no interrupts from either PIC */
		out8(0xa1, 0xff);
		for (u64 number = 0; number < TASKS; number++)
			prepare_task(number);
	}
	__asm__ volatile("lidt %0" : : "m"(idt));
	__asm__ volatile("ltr %w0" : : "r"(TSS_SELECTOR + (u32)cpu * 16));
	if (WORKERS)
		prepare_async();
	if (cpu)
		shared()->started_cpus++;
	else if (CPUS > 1)
		start_second_cpu();
	return go_on(&shared()->tasks[cpu]);
}
