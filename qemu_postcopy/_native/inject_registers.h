/*
 * Making a stopped thread run a system call: what differs between the architectures. Part of
 * inject.c; nobody else needs it.
 */
#ifndef QPC_INJECT_REGISTERS_H
#define QPC_INJECT_REGISTERS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/user.h>

#if (defined(__x86_64__) && !defined(__ILP32__)) || (defined(__aarch64__) && defined(__LP64__))

typedef struct user_regs_struct registers;

#if defined(__x86_64__)

static const unsigned char syscall_instruction[] = { 0x0f, 0x05 };
enum { INSTRUCTION_ALIGNMENT = 1 };

static inline uint64_t stack_pointer(const registers *regs)
{
    return regs->rsp;
}

static inline void prepare_call(registers *regs, uint64_t at, long number, const uint64_t args[4])
{
    regs->rip = at;
    regs->rax = (uint64_t)number;
    /* No restart of whatever call was interrupted: that waits until our registers are gone. */
    regs->orig_rax = (uint64_t)-1;
    regs->rdi = args[0];
    regs->rsi = args[1];
    regs->rdx = args[2];
    regs->r10 = args[3];
}

static inline int64_t call_result(const registers *regs)
{
    return (int64_t)regs->rax;
}

/* orig_rax is part of the set: the interrupted call restarts as if nothing had happened. */
static inline int restore_call_state(pid_t tid)
{
    (void)tid;
    return 0;
}

#else

static const unsigned char syscall_instruction[] = { 0x01, 0x00, 0x00, 0xd4 }; /* svc #0 */
enum { INSTRUCTION_ALIGNMENT = 4 };
#ifndef NT_ARM_SYSTEM_CALL
#define NT_ARM_SYSTEM_CALL 0x404
#endif

static inline uint64_t stack_pointer(const registers *regs)
{
    return regs->sp;
}

static inline void prepare_call(registers *regs, uint64_t at, long number, const uint64_t args[4])
{
    regs->pc = at;
    regs->regs[8] = (uint64_t)number;
    for (int i = 0; i < 4; i++)
        regs->regs[i] = args[i];
}

static inline int64_t call_result(const registers *regs)
{
    return (int64_t)regs->regs[0];
}

/*
 * arm64 winds an interrupted call back (pc on the svc, x0 as it was) before the tracer sees the
 * stop, so restoring the registers restarts it; a call that would go on by restart_syscall(2)
 * begins its time limit anew. Left to do: no call of ours may count as interrupted.
 */
static inline int restore_call_state(pid_t tid)
{
    int none = -1;
    struct iovec set = { &none, sizeof(none) };

    return ptrace(PTRACE_SETREGSET, tid, NT_ARM_SYSTEM_CALL, &set) < 0 ? -1 : 0;
}

#endif

#endif

#endif
