# The built-in guest, part 3: checks in ring 0 without paging: registers, flags, traps, segments, transfers, ports.

# What sensitive reads must show.
check_registers:
    pushl %cs
    popl %ecx
    BITS "push cs", %ecx, $0xffff, $KCODE
    movw %cs, %cx
    BITS "mov cs to register", %ecx, $0xffff, $KCODE
    movl $-1, scratch
    movw %cs, scratch
    IS "mov cs to memory writes 16 bits", scratch, $(0xffff0000 | KCODE)
    movl %ds, %ecx
    IS "mov ds to 32-bit register", %ecx, $KDATA
    movl %ss, %ecx
    IS "mov ss to 32-bit register", %ecx, $KDATA
    pushl %ss
    popl %ecx
    BITS "push ss", %ecx, $0xffff, $KDATA
    pushl %ds
    popl %ecx
    BITS "push ds", %ecx, $0xffff, $KDATA
    pushl %es
    popl %ecx
    BITS "push es", %ecx, $0xffff, $KDATA
    pushl %fs
    popl %ecx
    BITS "push fs", %ecx, $0xffff, $KDATA
    pushl %gs
    popl %ecx
    BITS "push gs", %ecx, $0xffff, $KDATA
    movl %esp, %ebx
    pushw %cs
    popw %cx
    subl %esp, %ebx
    IS "pushw and popw keep esp", %ebx, $0
    BITS "pushw cs", %ecx, $0xffff, $KCODE

    sgdtl scratch_buffer
    movzwl scratch_buffer, %ecx
    IS "sgdt limit", %ecx, $(gdt_end - gdt - 1)
    IS "sgdt base", scratch_buffer + 2, $gdt
    sidtl scratch_buffer
    movzwl scratch_buffer, %ecx
    IS "sidt limit", %ecx, $(0x82 * 8 - 1)
    IS "sidt base", scratch_buffer + 2, $idt
    sldt %cx
    BITS "sldt", %ecx, $0xffff, $LDT_SEL
    movl $-1, scratch
    sldt scratch
    IS "sldt to memory writes 16 bits", scratch, $(0xffff0000 | LDT_SEL)
    str %cx
    BITS "str", %ecx, $0xffff, $TSS_MAIN
    movb gdt + TSS_MAIN + 5, %cl
    BITS "ltr made the tss busy", %ecx, $0xff, $0x8b
    movl %cr0, %ebx
    smsw %cx
    andl $0xffff, %ebx
    BITS "smsw equals cr0", %ecx, $0xffff, %ebx
    BITS "smsw shows protected mode", %ecx, $1, $1

    movl %cr0, %ebx
    movl %ebx, %eax
    orl $0x2, %eax
    movl %eax, %cr0
    movl %cr0, %ecx
    BITS "cr0 keeps MP", %ecx, $0x80000003, $3
    movl %ebx, %cr0
    movl %cr0, %ecx
    IS "cr0 back", %ecx, %ebx
    movl $0x5a5a1234, %eax
    movl %eax, %cr2
    movl %cr2, %ecx
    IS "cr2 round trip", %ecx, $0x5a5a1234
    movl $PAGE_DIR, %eax
    movl %eax, %cr3
    movl %cr3, %ecx
    IS "cr3 round trip", %ecx, $PAGE_DIR
    movl %cr4, %ebx
    movl %ebx, %eax
    orl $4, %eax                          # TSD
    movl %eax, %cr4
    movl %cr4, %ecx
    BITS "cr4 keeps TSD", %ecx, $4, $4
    movl %ebx, %cr4
    movl %cr4, %ecx
    IS "cr4 back", %ecx, %ebx

    movl %cr0, %ebx
    smsw %ax
    orl $8, %eax
    lmsw %ax
    smsw %cx
    BITS "lmsw sets TS", %ecx, $8, $8
    clts
    movl %cr0, %ecx
    IS "clts", %ecx, %ebx
    xorl %eax, %eax
    lmsw %ax
    smsw %cx
    BITS "lmsw cannot clear PE", %ecx, $1, $1
    movl %ebx, %cr0

    movl $0x12340000, %eax
    movl %eax, %dr0
    movl %eax, %dr3
    movl %dr0, %ecx
    IS "dr0 round trip", %ecx, $0x12340000
    movl %dr3, %ecx
    IS "dr3 round trip", %ecx, $0x12340000
    xorl %eax, %eax
    movl %eax, %dr0
    movl %eax, %dr3
    movl %eax, %dr7
    movl %dr7, %ecx
    IS "dr7 reads bit 10 as one", %ecx, $0x400
    movl %dr6, %ecx
    BITS "dr6 has no breakpoint", %ecx, $15, $0

    xorl %eax, %eax
    cpuid
    cmpl $1, %eax
    setae %al
    movzbl %al, %ecx
    IS "cpuid has leaf 1", %ecx, $1
    movl $1, %eax
    cpuid
    BITS "cpuid shows an fpu", %edx, $1, $1
    testl $0x10000, %edx
    jz 1f
    movl $0x277, %ecx
    rdmsr
    movl %eax, %esi
    movl %edx, %edi
    movl $0x00070406, %eax
    movl $0x00070405, %edx
    wrmsr
    xorl %eax, %eax
    xorl %edx, %edx
    rdmsr
    IS "PAT msr low half", %eax, $0x00070406
    IS "PAT msr high half", %edx, $0x00070405
    movl %esi, %eax
    movl %edi, %edx
    wrmsr
    jmp 2f
1:  movl $text_no_pat, %esi
    call say_skip
2:  rdtsc
    movl %eax, %esi
    movl %edx, %edi
    rdtsc
    subl %esi, %eax
    sbbl %edi, %edx
    BITS "rdtsc runs forward", %edx, $0x80000000, $0
    wbinvd
    fninit
    fld1
    fld1
    faddp
    fistpl scratch
    IS "x87 adds", scratch, $2
    ret
    TEXT text_no_pat, "PAT msr: not in cpuid"

    # Sets EFLAGS to EAX with popf and reads them into ECX.
    .macro FLAGS value
    pushl $\value
    popfl
    pushfl
    popl %ecx
    .endm

check_flags:
    cli
    pushfl
    popl %ecx
    BITS "pushf after cli", %ecx, $0x200, $0
    sti
    pushfl
    popl %ecx
    cli
    BITS "pushf after sti", %ecx, $0x200, $0x200
    sti
    pushfw
    popw %cx
    cli
    BITS "pushfw after sti", %ecx, $0x200, $0x200
    FLAGS 0x202
    BITS "popf sets IF", %ecx, $0x200, $0x200
    FLAGS 0x2
    BITS "popf clears IF", %ecx, $0x200, $0
    pushw $0x202
    popfw
    pushfl
    popl %ecx
    cli
    BITS "popfw sets IF", %ecx, $0x200, $0x200
    FLAGS 0x3002
    BITS "popf sets IOPL 3", %ecx, $0x3000, $0x3000
    FLAGS 0x1002
    BITS "popf sets IOPL 1", %ecx, $0x3000, $0x1000
    cli
    pushfl
    popl %ecx
    BITS "cli leaves IOPL", %ecx, $0x3200, $0x1000
    FLAGS 0x4002
    BITS "popf sets NT", %ecx, $0x4000, $0x4000
    FLAGS 0x40002
    BITS "popf sets AC", %ecx, $0x40000, $0x40000
    FLAGS 0x200002
    BITS "popf sets ID", %ecx, $0x200000, $0x200000
    FLAGS 0x2
    IS "popf clears everything", %ecx, $2
    FLAGS 0x20002
    BITS "popf cannot set VM", %ecx, $0x20000, $0
    FLAGS 0x08d7
    IS "popf keeps arithmetic flags", %ecx, $0x08d7
    FLAGS 0x402
    cld
    BITS "popf sets DF", %ecx, $0x400, $0x400
    FLAGS 0x2
    stc
    sti
    pushfl
    popl %ecx
    cli
    BITS "sti leaves CF", %ecx, $0x201, $0x201
    # The classic: save, disable, restore.
    sti
    pushfl
    cli
    pushfl
    popl %ecx
    popfl
    pushfl
    popl %ebx
    cli
    BITS "irq save disables", %ecx, $0x200, $0
    BITS "irq restore enables", %ebx, $0x200, $0x200
    # A jump over a one-byte instruction, taken and not taken.
    cli
    xorl %eax, %eax
    testl %eax, %eax
    je 1f
    sti
1:  pushfl
    popl %ecx
    BITS "jump over sti taken", %ecx, $0x200, $0
    incl %eax
    testl %eax, %eax
    je 1f
    sti
1:  pushfl
    popl %ecx
    cli
    BITS "jump over sti not taken", %ecx, $0x200, $0x200
    # A loop whose head is the second of two one-byte instructions.
    movl $3, %ebx
    sti
    jmp 2f
1:  sti
2:  cli
    decl %ebx
    jnz 1b
    pushfl
    popl %ecx
    BITS "branch between sti and cli", %ecx, $0x200, $0
    # Prefixes that mean nothing.
    sti
    .byte 0x2e, 0x2e, 0xfa                # cs cs cli
    pushfl
    popl %ecx
    BITS "cli with segment prefixes", %ecx, $0x200, $0
    .byte 0x3e, 0xfb                      # ds sti
    .byte 0x26, 0x3e, 0x9c                # es ds pushf
    popl %ecx
    cli
    BITS "pushf with segment prefixes", %ecx, $0x200, $0x200
    sti
    movl %esp, %ebx
    .byte 0x66, 0x66, 0x9c                # pushfw, twice prefixed
    subl %esp, %ebx
    popw %cx
    cli
    IS "pushf with two operand-size prefixes pushes 2 bytes", %ebx, $2
    BITS "pushf with two operand-size prefixes", %ecx, $0x200, $0x200
    FAULTS "instruction of 16 bytes", 13, 0, .byte 0x3e,0x3e,0x3e,0x3e,0x3e,0x3e,0x3e,0x3e,0x3e,0x3e,0x3e,0x3e,0x3e,0x3e,0x3e,0xfa
    ret

check_traps:
    TRAPS "int3", 3, int3
    BITS "interrupt gate clears IF", last_live, $0x200, $0
    TRAPS "int 3, long form", 3, .byte 0xcd, 3
    sti
    TRAPS "int 80h", 0x80, int $0x80
    cli
    BITS "trap gate keeps IF", last_live, $0x200, $0x200
    BITS "the frame shows IF", last_eflags, $0x200, $0x200
    BITS "the frame shows cs", last_cs, $0xffff, $KCODE
    sti
    TRAPS "int 30h through an interrupt gate", 0x30, int $0x30
    pushfl
    popl %ecx
    cli
    BITS "iret restores IF", %ecx, $0x200, $0x200
    movb $0x7f, %al
    addb $1, %al
    TRAPS "into with OF", 4, into
    xorl %eax, %eax
    movl $-1, last_vector
    into
    IS "into without OF", last_vector, $-1
    FAULTS "ud2", 6, 0, ud2
    xorl %ecx, %ecx
    FAULTS "divide by zero", 0, 0, divl %ecx
    FAULTS "aam 0", 0, 0, .byte 0xd4, 0
    movl $1, scratch
    movl $2, scratch2
    movl $5, %eax
    FAULTS "bound", 5, 0, bound %eax, scratch
    movl $2, %eax
    movl $-1, last_vector
    bound %eax, scratch
    IS "bound inside", last_vector, $-1
    FAULTS "int through an absent gate", 11, 0x18a, int $0x31
    FAULTS "int beyond the idt", 13, 0x7fa, int $0xff
    # Single step: the trap comes after the instruction that follows popf.
    movl $(1f - .Lbegin + BASE), resume_eip
    movl $-1, last_vector
    pushl $0x102
    popfl
    nop
1:  FAULTED "single step", (1 << 16), (1b - .Lbegin + BASE)
    BITS "the frame shows TF", last_eflags, $0x100, $0x100
    pushl $2
    popfl
    movl %dr6, %ecx
    BITS "dr6 shows a single step", %ecx, $0x4000, $0x4000
    xorl %eax, %eax
    movl %eax, %dr6
    ret

    # A check of segment limits and types. QEMU's TCG does not enforce them, and is no oracle for them.
    .macro LIMIT text, vec, err, insn:vararg
    cmpl $0, no_limits
    jne 994f
    FAULTS "\text", \vec, \err, \insn
994:
    .endm

check_segments:
    movl $0x40000000, %eax
    cpuid
    cmpl $0x54474354, %ebx                # "TCGTCGTCGTCG"
    je 2f
    movl $0x40000200, %eax                # where subring names what it runs on itself
    cpuid
    cmpl $0x54474354, %ebx
    jne 1f
2:  incl no_limits
    movl $text_no_limits, %esi
    call say_skip
1:
    movl $KCODE, %ebx
    larl %ebx, %ecx
    sete %al
    movzbl %al, %eax
    IS "lar finds the code segment", %eax, $1
    BITS "lar of the code segment", %ecx, $0x00f0ff00, $0x00c09b00
    movl $UDATA, %ebx
    larl %ebx, %ecx
    BITS "lar of the user's data segment", %ecx, $0x00f0ff00, $0x00c0f300
    movl $TSS_MAIN, %ebx
    larl %ebx, %ecx
    BITS "lar of the busy tss", %ecx, $0x00f0ff00, $0x00008b00
    movl $OUTSIDE, %ebx
    movl $0x77, %ecx
    larl %ebx, %ecx
    setne %al
    movzbl %al, %eax
    IS "lar outside the table clears ZF", %eax, $1
    IS "lar outside the table writes nothing", %ecx, $0x77
    movl $KDATA, %ebx
    lsll %ebx, %ecx
    IS "lsl of a flat segment", %ecx, $0xffffffff
    movl $TLS, %ebx
    lsll %ebx, %ecx
    IS "lsl of a small segment", %ecx, $15
    movl $TSS_MAIN, %ebx
    lsll %ebx, %ecx
    IS "lsl of the tss", %ecx, $(tss_end - tss - 1)
    movl $GATE, %ebx
    lsll %ebx, %ecx
    setne %al
    movzbl %al, %eax
    IS "lsl of a call gate clears ZF", %eax, $1

    .macro VERIFY text, insn, selector, zf
    movl $\selector, %ebx
    \insn %bx
    sete %al
    movzbl %al, %eax
    IS "\text", %eax, $\zf
    .endm
    VERIFY "verr data", verr, KDATA, 1
    VERIFY "verr readable code", verr, KCODE, 1
    VERIFY "verw data", verw, KDATA, 1
    VERIFY "verw code", verw, KCODE, 0
    VERIFY "verw read-only data", verw, RODATA, 0
    VERIFY "verr tss", verr, TSS_MAIN, 0
    VERIFY "verr null", verr, 0, 0
    VERIFY "verr outside", verr, OUTSIDE, 0
    movw $3, %ax
    movw $KDATA, %bx
    arpl %ax, %bx
    BITS "arpl", %ebx, $0xffff, $(KDATA | 3)

    movl $TLS, %eax
    movw %ax, %fs
    movl %fs:4, %ecx
    IS "fs base", %ecx, $0x22222222
    movl %fs, %ecx
    IS "fs selector reads back", %ecx, $TLS
    LIMIT "beyond the fs limit", 13, 0, movl %fs:16, %ecx
    LIMIT "across the fs limit", 13, 0, movl %fs:13, %ecx
    movl $NEGTLS, %eax
    movw %ax, %gs
    movl %gs:0, %ecx
    IS "gs base", %ecx, $0x55555555
    movl %gs:-4, %ecx
    IS "gs with a negative offset", %ecx, $0x44444444
    movl $0x0c, %eax
    movw %ax, %gs
    movl %gs:8, %ecx
    IS "gs from the ldt", %ecx, $0x33333333
    movl $DOWN, %eax
    movw %ax, %gs
    LIMIT "below an expand-down limit", 13, 0, movl %gs:0xffc, %ecx
    movl %gs:0x101000, %ecx
    movl 0x101000, %ebx
    IS "above an expand-down limit", %ecx, %ebx
    xorl %eax, %eax
    movw %ax, %gs
    movl %gs, %ecx
    IS "null selector reads back", %ecx, $0
    LIMIT "through a null selector", 13, 0, movl %gs:0, %ecx
    movl $RODATA, %eax
    movw %ax, %es
    movl %es:tls_area, %ecx
    IS "read-only data can be read", %ecx, $0x11111111
    LIMIT "read-only data cannot be written", 13, 0, movl %ecx, %es:tls_area
    LIMIT "code cannot be written", 13, 0, movl %ecx, %cs:tls_area
    movl %cs:tls_area, %ecx
    IS "code can be read", %ecx, $0x11111111
    movl $KDATA, %eax
    movw %ax, %es

    movl $OUTSIDE, %eax
    FAULTS "mov ds outside the table", 13, OUTSIDE, movw %ax, %ds
    movl $(OUTSIDE | 4), %eax
    FAULTS "mov es outside the ldt", 13, (OUTSIDE | 4), movw %ax, %es
    movl $ABSENT, %eax
    FAULTS "mov es not present", 11, ABSENT, movw %ax, %es
    FAULTS "mov ss not present", 12, ABSENT, movw %ax, %ss
    movl $RODATA, %eax
    FAULTS "mov ss read-only", 13, RODATA, movw %ax, %ss
    movl $UDATA, %eax
    FAULTS "mov ss of another ring", 13, (UDATA & ~3), movw %ax, %ss
    xorl %eax, %eax
    FAULTS "mov ss null", 13, 0, movw %ax, %ss
    movl $TSS_MAIN, %eax
    FAULTS "mov ds of a system segment", 13, TSS_MAIN, movw %ax, %ds
    FAULTS "ltr of a busy tss", 13, TSS_MAIN, ltr %ax
    FAULTS "lldt of no ldt", 13, TSS_MAIN, lldt %ax
    FAULTS "mov to cs", 6, 0, .byte 0x8e, 0xc8
    pushl $OUTSIDE
    FAULTS "pop ds outside the table", 13, OUTSIDE, popl %ds
    popl %ecx
    IS "a faulting pop leaves the stack", %ecx, $OUTSIDE
    movb gdt + FRESH + 5, %cl
    BITS "descriptor not yet accessed", %ecx, $0xff, $0x92
    movl $FRESH, %eax
    movw %ax, %es
    movb gdt + FRESH + 5, %cl
    BITS "a load marks the descriptor accessed", %ecx, $0xff, $0x93
    pushl $TLS
    popl %es
    movl %es:12, %ecx
    IS "pop es", %ecx, $0x44444444

    movl $KDATA, %eax
    movw %ax, %es
    movl $8, scratch
    movl $TLS, scratch2
    lfsl scratch, %ecx
    movl %fs:(%ecx), %ebx
    IS "lfs", %ebx, $0x33333333
    lgsl scratch, %ecx
    movl %gs:(%ecx), %ebx
    IS "lgs", %ebx, $0x33333333
    lesl scratch, %ecx
    movl %es:(%ecx), %ebx
    IS "les", %ebx, $0x33333333
    ldsl scratch, %ecx
    movl (%ecx), %ebx
    movl $KDATA, %eax
    movw %ax, %ds
    movw %ax, %es
    IS "lds", %ebx, $0x33333333
    movl %esp, scratch
    movl $SHORTSS, scratch2
    lssl scratch, %esp
    movl %ss, %ecx
    IS "lss", %ecx, $SHORTSS
    movl $0x15fffc, %ebp
    movl (%ebp), %ebx
    movl $0x160000, %ebp
    LIMIT "beyond the stack limit", 12, 0, movl (%ebp), %ebx
    LIMIT "beyond the limit through ss prefix", 12, 0, movl %ss:0x15fffd, %ebx
    movl $KDATA, %eax
    movw %ax, %ss
    movw %ax, %fs
    movw %ax, %gs
    ret

    TEXT text_no_limits, "segment limits and types of memory accesses: QEMU's TCG does not check them"

check_transfers:
    movl $0, scratch
    ljmp $KCODE, $far_1
    incl scratch
    L far_1
    movl %cs, %ecx
    BITS "far jump", %ecx, $0xffff, $KCODE
    IS "far jump skips", scratch, $0
    ljmp $CONFORM, $far_2
    L far_2
    movl %cs, %ecx
    BITS "far jump to conforming code", %ecx, $0xffff, $CONFORM
    movl $far_3, scratch
    movl $KCODE, scratch2
    ljmpl *scratch
    L far_3
    movl %cs, %ecx
    BITS "far jump through memory", %ecx, $0xffff, $KCODE
    movl %esp, %ebx
    lcall $KCODE, $far_callee
    subl %esp, %ebx
    IS "far call returns", %ecx, $0xca11
    IS "far call balances the stack", %ebx, $0
    movl %esp, %ebx
    pushl $7
    pushl $9
    lcall $KCODE, $far_callee_8
    subl %esp, %ebx
    IS "far return releases", %ebx, $0
    BITS "far call pushes cs", %edx, $0xffff, $KCODE
    lcall $GATE, $0
    IS "far call through a gate", %ecx, $0x9a7e
    pushl $0x206
    pushl $KCODE
    pushl $far_4
    iretl
    L far_4
    pushfl
    popl %ecx
    cli
    BITS "iret loads flags", %ecx, $0x204, $0x204
    pushl %cs
    pushl $far_5
    lretl
    L far_5
    FAULTS "far jump null", 13, 0, ljmp $0, $far_1
    FAULTS "far jump to data", 13, KDATA, ljmp $KDATA, $far_1
    FAULTS "far jump not present", 11, ABSCODE, ljmp $ABSCODE, $far_1
    FAULTS "far jump to user code", 13, (UCODE & ~3), ljmp $UCODE, $far_1
    FAULTS "far call outside", 13, OUTSIDE, lcall $OUTSIDE, $far_1
    pushl $2
    pushl $OUTSIDE
    pushl $far_1
    FAULTS "iret outside", 13, OUTSIDE, iretl
    addl $12, %esp
    # 16-bit code and back.
    xorl %ecx, %ecx
    ljmp $CODE16, $(.Lcode16 - .Lbegin)
    .code16
.Lcode16:
    movw $0x1616, %cx
    pushfw
    popw %dx
    movw %cs, %bx
    ljmpl $KCODE, $far_6
    .code32
    L far_6
    BITS "16-bit code", %ecx, $0xffff, $0x1616
    BITS "cs in 16-bit code", %ebx, $0xffff, $CODE16
    ret
    L far_callee
    movl $0xca11, %ecx
    lretl
    L far_callee_8
    movl 4(%esp), %edx
    lretl $8
    L gate_target
    movl $0x9a7e, %ecx
    lretl

check_io:
    movw $(COM1 + 7), %dx                 # the scratch register
    movb $0xa5, %al
    outb %al, %dx
    xorb %al, %al
    inb %dx, %al
    BITS "out and in", %eax, $0xff, $0xa5
    movb $0xfb, %al
    outb %al, $0x21
    xorb %al, %al
    inb $0x21, %al
    BITS "out and in with an immediate port", %eax, $0xff, $0xfb
    movb $0xff, %al
    outb %al, $0x21
    movb $0x3c, scratch_buffer
    movb $0xc3, scratch_buffer + 1
    movl $scratch_buffer, %esi
    movl $2, %ecx
    rep outsb
    inb %dx, %al
    BITS "rep outsb leaves the last byte", %eax, $0xff, $0xc3
    IS "rep outsb counts down", %ecx, $0
    IS "rep outsb moves esi", %esi, $(scratch_buffer + 2)
    movl $scratch_buffer + 8, %edi
    movl $3, %ecx
    rep insb
    BITS "rep insb reads", scratch_buffer + 8, $0xffffff, $0xc3c3c3
    IS "rep insb moves edi", %edi, $(scratch_buffer + 11)
    movl $scratch_buffer + 8, %edi
    std
    insb
    cld
    IS "insb goes down with DF", %edi, $(scratch_buffer + 7)
    movl $5, %esi
    xorl %ecx, %ecx
    rep outsb
    IS "rep outsb zero times", %esi, $5
    movl $GATE, %eax
    ret
