/* What the parts of the micro guest share: where things lie, its tasks, and what ring 3 may ask for.
 *
 * All memory below 4 GiB is mapped one to one, for ring 3 too; there are no variables (a ROM has no
 * place for them) but at the addresses below. Built with: AREA_BYTES, RING0_BYTES, RING3_FLAGS,
 * CPUS (1 or 2), WORKERS (0: each CPU runs one task, which verifies all of AREA).
 */
#ifndef MICRO_H
#define MICRO_H

#define GDT 0x1000        /* in RAM: ltr writes to it */
#define TSS 0x1100        /* of CPU n: + n * TSS_STRIDE */
#define TSS_STRIDE 0x100
#define IDT 0x2000
#define ASYNC_AREA 0x3000 /* where KVM tells of asynchronous page faults */
#define PLACES 0x3800     /* a u64 of each CPU: how far it has come, see meet() */
#define SHARED 0x4000     /* struct shared */
#define TRAMPOLINE 0x8000 /* where the second CPU starts */
#define PAGE_TABLES 0x10000
#define RING0_STACK_END 0x20000 /* of CPU n: - n * RING0_STACK_BYTES */
#define RING0_STACK_BYTES 0x5000
#define RING3_STACKS 0x30000 /* of task n: from n * 4096 on */
#define RING0_AREA 0x200000
#define AREA 0x400000

#define READY_VECTOR 0xf0
#define CODE3 0x33
#define DATA3 0x2b
#define TSS_SELECTOR 0x38 /* of CPU n: + n * 16 */

#ifndef __ASSEMBLER__

/* No table of addresses for what another file defines: it would be a variable. */
#pragma GCC visibility push(hidden)

typedef unsigned long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define AREA_WORDS (AREA_BYTES / 8UL)
#define RING0_WORDS (RING0_BYTES / 8UL)
#define PAGE_WORDS 512UL
/* With workers, task 0 of the one CPU speaks for them. */
#define TASKS (WORKERS ? WORKERS + 1 : CPUS)

/* As start.S saves it on the way into ring 0; from `error` on it is the processor's. */
struct frame {
	u64 r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
	u64 error, rip, cs, rflags, rsp, ss;
};

struct task {
	u64 ring0_stack;    /* start.S looks for it below the frame */
	struct frame frame; /* its end is what the TSS names while the task runs: a multiple of 16 */
	u64 number;
	u64 cpu;
	u64 waits;  /* for the page with `token` */
	u64 token;
	u64 passes; /* times that it has verified what is its own to verify */
	u64 bad;    /* words that were not what was written, in all passes */
};

struct shared {
	u64 async;        /* KVM has been told to send asynchronous page faults */
	u64 waiting;      /* tasks that wait for a page now */
	u64 most_waiting;
	u64 not_present;  /* pages that were waited for */
	u64 ready;        /* 'page ready' interrupts */
	u64 started_cpus;
	struct task tasks[];
};

static inline struct shared *shared(void)
{
	return (struct shared *)SHARED;
}

enum call { CALL_PRINT, CALL_FILL, CALL_VERIFY, CALL_YIELD };

/* What is written at an address: never zero, and different for each word. */
static inline u64 pattern(u64 address)
{
	return (address * 0x9e3779b97f4a7c15UL) | 1;
}

static inline void fill(u64 start, u64 words)
{
	volatile u64 *at = (volatile u64 *)start;
	for (u64 i = 0; i < words; i++)
		at[i] = pattern(start + i * 8);
}

/* The number of words that are not what was written. */
static inline u64 verify(u64 start, u64 words)
{
	volatile u64 *at = (volatile u64 *)start;
	u64 bad = 0;
	for (u64 i = 0; i < words; i++)
		bad += at[i] != pattern(start + i * 8);
	return bad;
}

static inline u64 rdmsr(u32 number)
{
	u32 low, high;
	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(number));
	return (u64)high << 32 | low;
}

static inline void wrmsr(u32 number, u64 value)
{
	__asm__ volatile("wrmsr" : : "c"(number), "a"((u32)value), "d"((u32)(value >> 32)));
}

static inline void write_lapic(u64 offset, u32 value)
{
	*(volatile u32 *)(0xfee00000UL + offset) = value;
}

/* ring0.c */
__attribute__((noreturn)) void trouble(u64 first, u64 second, u64 third);

/* async.c: ring 0's side of asynchronous page faults; each returns the task that runs next. */
void prepare_async(void);
struct task *next_task(struct task *task);
struct task *page_not_present(struct task *task);
struct task *page_ready(struct task *task);

/* second_cpu.c */
void start_second_cpu(void);

/* verify.c, workers.c: where tasks begin in ring 3; they never end. */
void run_verifier(u64 number);
void run_speaker(u64 number);
void run_worker(u64 number);

/* report.c, in ring 3 */
u64 call(enum call number, const void *argument, u64 length);
u64 put_text(char *line, u64 at, const char *text);
u64 put_number(char *line, u64 at, u64 value);

#endif
#endif
