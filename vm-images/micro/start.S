/* From the reset vector to long mode, and the way between ring 3 and ring 0.
 *
 * Runs from the ROM at 0xffff0000. In RAM below 1 MiB lie the GDT (0x1000; ltr writes to it), TSS
 * (0x1100), IDT (0x2000), page tables (0x10000, 4 GiB one to one, for ring 3 too) and the stacks of
 * ring 0 (below 0x20000) and ring 3 (below 0x30000). Interrupts are off, or on in ring 3
 * (RING3_FLAGS) with none coming.
 */
	.section .text.start, "ax"
	.code16
	.globl start16
start16:
	movl $rom_gdt_pointer, %ebx
	andl $0xffff, %ebx
	lgdtl %cs:(%bx)
	movl %cr0, %eax
	orl $1, %eax
	movl %eax, %cr0
	ljmpl $0x08, $start32

	.code32
start32:
	movl $0x10, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $0x20000, %esp
	cld
	movl $rom_gdt, %esi
	movl $0x1000, %edi
	movl $((rom_gdt_end - rom_gdt) / 4), %ecx
	rep movsl
	lgdtl ram_gdt_pointer
	xorl %eax, %eax
	movl $0x10000, %edi
	movl $(0x6000 / 4), %ecx
	rep stosl
	movl $0x11027, 0x10000
	movl $0x12027, 0x11000
	movl $0x13027, 0x11008
	movl $0x14027, 0x11010
	movl $0x15027, 0x11018
	movl $0x12000, %edi
	movl $0xe7, %eax	/* present, writable, for ring 3, accessed, dirty, 2 MiB */
	movl $2048, %ecx
1:	movl %eax, (%edi)
	addl $0x200000, %eax
	addl $8, %edi
	decl %ecx
	jnz 1b
	movl $0x10000, %eax
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
	movl $0x20000, %esp
	call prepare_ring0
	pushq $0x2b
	pushq $0x30000
	pushq $RING3_FLAGS
	pushq $0x33
	leaq ring3_start(%rip), %rax
	pushq %rax
	iretq

ring3_start:
	call ring3_main
	jmp .

/* ud2 in ring 3 with rdi, rsi, rdx: the answer is in rax. */
	.globl on_ud2
on_ud2:
	pushq %rcx
	pushq %rdx
	pushq %rsi
	pushq %rdi
	pushq %r8
	pushq %r9
	pushq %r10
	pushq %r11
	cld
	call ring0_call
	popq %r11
	popq %r10
	popq %r9
	popq %r8
	popq %rdi
	popq %rsi
	popq %rdx
	popq %rcx
	addq $2, (%rsp)
	iretq

	.globl on_trouble
on_trouble:
	movq %cr2, %rdi
	movq (%rsp), %rsi
	movq 8(%rsp), %rdx
	andq $-16, %rsp
	call ring0_trouble
	jmp .

	.balign 8
rom_gdt:
	.quad 0
	.quad 0x00cf9b000000ffff	/* 08: code of 32 bits */
	.quad 0x00cf93000000ffff	/* 10: data */
	.quad 0x00af9b000000ffff	/* 18: code of 64 bits */
	.quad 0x00cf93000000ffff	/* 20: data */
	.quad 0x00cff3000000ffff	/* 28: data, ring 3 */
	.quad 0x00affb000000ffff	/* 30: code of 64 bits, ring 3 */
	.quad 0x0000890011000067	/* 38: TSS at 0x1100 */
	.quad 0
rom_gdt_end:
rom_gdt_pointer:
	.word rom_gdt_end - rom_gdt - 1
	.long rom_gdt
ram_gdt_pointer:
	.word rom_gdt_end - rom_gdt - 1
	.long 0x1000

	.section .reset, "ax"
	.code16
	cli
	.byte 0xe9
	.word start16 - . - 2
	.balign 16, 0
