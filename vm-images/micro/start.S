/* From the reset vector, or a PVH start, to long mode; and the way between ring 3 and ring 0.
 *
 * As a ROM it runs at 0xffff0000, as an ELF file at 1 MiB. Interrupts are off, or on in ring 3
 * (RING3_FLAGS).
 */
#include "micro.h"

	.section .text.start, "ax"
	.code16
	.globl start16
start16:
	movl $boot_gdt_pointer, %ebx
	andl $0xffff, %ebx
	lgdtl %cs:(%bx)
	movl %cr0, %eax
	orl $1, %eax
	movl %eax, %cr0
	ljmpl $0x08, $start32

	.code32
	/* docs of Xen, misc/pvh.pandoc: 32 bits, flat segments, paging off */
	.globl start_pvh
start_pvh:
	cli
	lgdtl boot_gdt_pointer
	ljmpl $0x08, $start32

start32:
	movl $0x10, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	cld
	movl $boot_gdt, %esi
	movl $GDT, %edi
	movl $((boot_gdt_end - boot_gdt) / 4), %ecx
	rep movsl
	xorl %eax, %eax
	movl $PAGE_TABLES, %edi
	movl $(0x6000 / 4), %ecx
	rep stosl
	movl $(PAGE_TABLES + 0x1027), PAGE_TABLES
	movl $(PAGE_TABLES + 0x2027), PAGE_TABLES + 0x1000
	movl $(PAGE_TABLES + 0x3027), PAGE_TABLES + 0x1008
	movl $(PAGE_TABLES + 0x4027), PAGE_TABLES + 0x1010
	movl $(PAGE_TABLES + 0x5027), PAGE_TABLES + 0x1018
	movl $(PAGE_TABLES + 0x2000), %edi
	movl $0xe7, %eax	/* present, writable, for ring 3, accessed, dirty, 2 MiB */
	movl $2048, %ecx
1:	movl %eax, (%edi)
	addl $0x200000, %eax
	addl $8, %edi
	decl %ecx
	jnz 1b
	xorl %ebx, %ebx		/* CPU 0 */
	jmp enter_long_mode

	/* The second CPU, from its trampoline: the tables are there. */
second_start32:
	movl $0x10, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $1, %ebx

enter_long_mode:
	lgdtl ram_gdt_pointer
	movl $PAGE_TABLES, %eax
	movl %eax, %cr3
	movl $0x20, %eax	/* PAE */
	movl %eax, %cr4
	movl $0xc0000080, %ecx	/* EFER */
	rdmsr
	orl $0x100, %eax	/* LME */
	wrmsr
	movl %cr0, %eax
	orl $0x80000000, %eax
	movl %eax, %cr0
	ljmpl $0x18, $start64

	.code64
start64:
	movl $0x20, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	imull $-RING0_STACK_BYTES, %ebx, %eax
	addl $RING0_STACK_END, %eax
	movl %eax, %esp
	movl %ebx, %edi
	cld
	call ring0_main
	jmp resume

	/* 16 bits, copied to TRAMPOLINE, where the second CPU runs it with CS = TRAMPOLINE / 16. */
	.code16
	.globl trampoline, trampoline_end
trampoline:
	cli
	lgdtl %cs:(trampoline_gdt_pointer - trampoline)
	movl %cr0, %eax
	orl $1, %eax
	movl %eax, %cr0
	ljmpl $0x08, $second_start32
trampoline_gdt_pointer:
	.word boot_gdt_end - boot_gdt - 1
	.long GDT
trampoline_end:

	.code64
	/* Out of ring 3, on the frame of its task (see struct task); ring0_enter() says who goes on. */
	.globl on_ud2, on_page_fault, on_ready, on_trouble
on_ud2:
	testb $3, 8(%rsp)
	jz on_trouble
	pushq $0
	pushq %rax
	movl $6, %eax
	jmp enter
on_page_fault:
	testb $3, 16(%rsp)
	jz on_trouble
	pushq %rax
	movl $14, %eax
	jmp enter
on_ready:
	pushq $0
	pushq %rax
	movl $READY_VECTOR, %eax
enter:
	pushq %rbx
	pushq %rcx
	pushq %rdx
	pushq %rsi
	pushq %rdi
	pushq %rbp
	pushq %r8
	pushq %r9
	pushq %r10
	pushq %r11
	pushq %r12
	pushq %r13
	pushq %r14
	pushq %r15
	cld
	leaq -8(%rsp), %rdi	/* the task */
	movl %eax, %esi
	movq (%rdi), %rsp
	call ring0_enter
	/* rax: the frame of the task that goes on */
resume:
	movq %rax, %rsp
	popq %r15
	popq %r14
	popq %r13
	popq %r12
	popq %r11
	popq %r10
	popq %r9
	popq %r8
	popq %rbp
	popq %rdi
	popq %rsi
	popq %rdx
	popq %rcx
	popq %rbx
	popq %rax
	addq $8, %rsp
	iretq

on_trouble:
	movq %cr2, %rdi
	movq (%rsp), %rsi
	movq 8(%rsp), %rdx
	andq $-16, %rsp
	call trouble
	jmp .

	.balign 8
boot_gdt:
	.quad 0
	.quad 0x00cf9b000000ffff	/* 08: code of 32 bits */
	.quad 0x00cf93000000ffff	/* 10: data */
	.quad 0x00af9b000000ffff	/* 18: code of 64 bits */
	.quad 0x00cf93000000ffff	/* 20: data */
	.quad 0x00cff3000000ffff	/* 28: data, ring 3 */
	.quad 0x00affb000000ffff	/* 30: code of 64 bits, ring 3 */
	.quad 0x0000890000000067 | TSS << 16	/* 38: TSS of CPU 0 */
	.quad 0
	.quad 0x0000890000000067 | (TSS + TSS_STRIDE) << 16	/* 48: of CPU 1 */
	.quad 0
boot_gdt_end:
boot_gdt_pointer:
	.word boot_gdt_end - boot_gdt - 1
	.long boot_gdt
ram_gdt_pointer:
	.word boot_gdt_end - boot_gdt - 1
	.long GDT

#ifdef PVH
	.section .note.Xen, "a", @note
	.balign 4
	.long 4, 4, 18		/* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.long start_pvh
#else
	.section .reset, "ax"
	.code16
	cli
	.byte 0xe9
	.word start16 - . - 2
	.balign 16, 0
#endif

	.section .note.GNU-stack, "", @progbits
