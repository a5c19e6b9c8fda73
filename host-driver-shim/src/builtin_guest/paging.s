# The built-in guest, part 4: paging, changing code, interrupts, user mode, double fault.

    .set TEST_PTE, TABLE_1                # of linear TEST; the next page's is 4 further on

check_paging:
    movl %cr0, %ecx
    BITS "cr0 shows PG and WP", %ecx, $0x80010001, $0x80010001
    movl $0xaaaaaaaa, PAGE_A
    movl $0xbbbbbbbb, PAGE_B
    movl $(PAGE_A | 3), TEST_PTE
    movl TEST, %ecx
    IS "read through a page table", %ecx, $0xaaaaaaaa
    movl TEST_PTE, %ecx
    BITS "a read sets A, not D", %ecx, $0x60, $0x20
    movl $0xa1a1a1a1, TEST
    movl TEST_PTE, %ecx
    BITS "a write sets D", %ecx, $0x60, $0x60
    movl PAGE_A, %ecx
    IS "the write arrived", %ecx, $0xa1a1a1a1
    movl $(PAGE_B | 3), TEST_PTE
    invlpg TEST
    movl TEST, %ecx
    IS "remap with invlpg", %ecx, $0xbbbbbbbb
    movl $(PAGE_A | 3), TEST_PTE
    movl %cr3, %eax
    movl %eax, %cr3
    movl TEST, %ecx
    IS "remap with a cr3 load", %ecx, $0xa1a1a1a1

    FAULTS "read not present", 14, 0, movl TEST + 0x1000, %ecx
    IS "cr2 of the read", last_cr2, $(TEST + 0x1000)
    FAULTS "write not present", 14, 2, movl %ecx, TEST + 0x1ffc
    IS "cr2 of the write", last_cr2, $(TEST + 0x1ffc)
    FAULTS "read across into not present", 14, 0, movl TEST + 0xffe, %ecx
    IS "cr2 is the first byte that faults", last_cr2, $(TEST + 0x1000)
    movl $0x5e5e5e5e, TEST + 0xffc
    FAULTS "write across into not present", 14, 2, movl %esp, TEST + 0xffe
    movl TEST + 0xffc, %ecx
    IS "a faulting write writes nothing", %ecx, $0x5e5e5e5e
    FAULTS "no page directory entry", 14, 0, movl 0x80000000, %ecx
    movl $(2f - .Lbegin + BASE), resume_eip
    movl $-1, last_vector
    movl $TEST + 0x1000, %eax
    jmp *%eax
2:  FAULTED "jump into not present", (14 << 16), (TEST + 0x1000)
    IS "cr2 of the jump", last_cr2, $(TEST + 0x1000)
    movl $(PAGE_A | 1), TEST_PTE
    invlpg TEST
    FAULTS "write to read-only with WP", 14, 3, incl TEST
    IS "cr2 of the read-only write", last_cr2, $TEST
    movl %cr0, %ebx
    movl %ebx, %eax
    andl $~0x10000, %eax
    movl %eax, %cr0
    movl $0x0bad0bad, TEST
    movl %ebx, %cr0
    movl PAGE_A, %ecx
    IS "write to read-only without WP", %ecx, $0x0bad0bad
    FAULTS "read-only again with WP back", 14, 3, movl %ecx, TEST
    # rep movs that faults half way keeps its progress.
    movl $(PAGE_A | 3), TEST_PTE
    invlpg TEST
    movl $gdt, %esi
    movl $TEST + 0xff8, %edi
    movl $8, %ecx
    FAULTS "rep movs into not present", 14, 2, rep movsl
    IS "rep movs keeps its progress", %ecx, $6
    IS "rep movs keeps edi", %edi, $(TEST + 0x1000)

    movl gdt + 8, %ecx
    movl ALIAS + gdt + 8, %ebx
    IS "the second mapping shows the same", %ebx, %ecx
    movl $0x600d600d, ALIAS + PAGE_B
    movl PAGE_B, %ecx
    IS "a write through the second mapping", %ecx, $0x600d600d
    cmpl $0, have_pse
    je 3f
    movl PAGE_DIR + (ALIAS >> 22) * 4, %ecx
    BITS "A and D in a 4 MiB entry", %ecx, $0xe3, $0xe3
    ret
3:  movl $text_no_pse, %esi
    call say_skip
    ret
    TEXT text_no_pse, "4 MiB pages: not in cpuid"

# Writes the bytes at ESI, ECX of them, to the code page.
put_code:
    movl $PAGE_CODE, %edi
    rep movsb
    ret

    .macro CODE name
    movl $\name, %esi
    movl $\name\()_size, %ecx
    call put_code
    .endm

check_code:
    CODE snippet_1
    call .Lcall_code
    IS "code written at run time", %eax, $0x101
    movl $0x202, PAGE_CODE + 1
    call .Lcall_code
    IS "an operand changed", %eax, $0x202
    CODE snippet_if
    sti
    call .Lcall_code
    cli
    BITS "sensitive code written at run time", %eax, $0x200, $0x200
    movb $0xfa, PAGE_CODE                 # nop becomes cli
    sti
    call .Lcall_code
    cli
    BITS "nop changed to cli", %eax, $0x200, $0
    movb $0x90, PAGE_CODE
    sti
    call .Lcall_code
    cli
    BITS "cli changed to nop", %eax, $0x200, $0x200
    movl PAGE_CODE, %ecx
    IS "code reads back as written", %ecx, $0xc3589c90
    # The same bytes at another linear address.
    movl $(PAGE_CODE | 3), TEST_PTE
    invlpg TEST
    movl $TEST, %eax
    sti
    call *%eax
    cli
    BITS "the same code at a second address", %eax, $0x200, $0x200
    CODE snippet_here
    movl $TEST, %eax
    call *%eax
    IS "position seen at the second address", %eax, $(TEST + 5)
    call .Lcall_code
    IS "position seen at the first address", %eax, $(PAGE_CODE + 5)
    # A write through one address, executed at the other.
    CODE snippet_1
    movl $TEST, %eax
    call *%eax
    IS "executed through the alias", %eax, $0x101
    movb $0x77, PAGE_CODE + 1
    movl $TEST, %eax
    call *%eax
    IS "written here, executed there", %eax, $0x177
    movb $0x78, TEST + 1
    call .Lcall_code
    IS "written there, executed here", %eax, $0x178
    # Code that changes the instruction it is about to execute, in its own page.
    CODE snippet_self
    call .Lcall_code
    IS "code that changes itself", %eax, $0x5e1f
    # An instruction across two pages that are not neighbours in memory.
    movl $(PAGE_B | 3), TEST_PTE
    movl $(PAGE_A | 3), TEST_PTE + 4
    invlpg TEST
    invlpg TEST + 0x1000
    movl $0x2211b890, PAGE_B + 0xffc      # nop; mov eax, imm32
    movl $0x90c34433, PAGE_A              # ...; ret
    movl $TEST + 0xffc, %eax
    call *%eax
    IS "instruction across two pages", %eax, $0x44332211
    # Remap the page under the code.
    movl $(PAGE_CODE | 3), TEST_PTE
    CODE snippet_1
    invlpg TEST
    movl $TEST, %eax
    call *%eax
    IS "code before the remap", %eax, $0x101
    movb $0xb8, PAGE_B
    movl $0x303, PAGE_B + 1
    movb $0xc3, PAGE_B + 5
    movl $(PAGE_B | 3), TEST_PTE
    invlpg TEST
    movl $TEST, %eax
    call *%eax
    IS "code after the remap", %eax, $0x303
    # Into the middle of an instruction: mov eax, c3589cfah holds cli; pushf; pop eax; ret.
    call .Lovert
    IS "an instruction with another inside", %eax, $0xc3589cfa
    sti
    movl $overt + 1, %eax
    call *%eax
    BITS "a call into the middle of an instruction", %eax, $0x200, $0
    call .Lovert
    IS "and the outer one again", %eax, $0xc3589cfa
    # The kernel's own code at its second address.
    movl $(4f - .Lbegin + BASE + ALIAS), %eax
    jmp *%eax
4:  call 5f
5:  popl %ecx
    pushl %cs
    popl %ebx
    movl $(6f - .Lbegin + BASE), %eax
    jmp *%eax
6:  IS "running at the second mapping", %ecx, $(5b - .Lbegin + BASE + ALIAS)
    BITS "push cs at the second mapping", %ebx, $0xffff, $KCODE
    ret

.Lcall_code:
    movl $PAGE_CODE, %eax
    jmp *%eax

    L overt
.Lovert:
    movl $0xc3589cfa, %eax
    ret

    .macro SNIPPET name
    .subsection 1
    L \name
    .endm
    .macro SNIPPET_END name
    .set \name\()_size, . - .L_\name
    .subsection 0
    .endm
    SNIPPET snippet_1
    movl $0x101, %eax
    ret
    SNIPPET_END snippet_1
    SNIPPET snippet_if
    nop
    pushfl
    popl %eax
    ret
    SNIPPET_END snippet_if
    SNIPPET snippet_here
    call 1f
1:  popl %eax
    ret
    SNIPPET_END snippet_here
    SNIPPET snippet_self
    movw $0x5e1f, PAGE_CODE + 9 + 2 + 1   # the operand of the last mov
    jmp 1f
1:  movl $0x0, %eax
    ret
    SNIPPET_END snippet_self

# Waits until the timer's request stands in the interrupt controller; IF is clear.
wait_pending:
    movb $0x0a, %al                       # OCW3: read IRR
    outb %al, $0x20
1:  inb $0x20, %al
    testb $1, %al
    jz 1b
    ret

check_interrupts:
    cli
    movb $0xfe, %al
    outb %al, $0x21
    movl ticks, %ebx
    call wait_pending
    IS "no interrupt while IF is clear", ticks, %ebx
    call wait_pending
    movl ticks, %ebx
    sti
    cli
    IS "sti and cli let nothing in", ticks, %ebx
    sti
    nop
    cli
    ATLEAST "sti, nop, cli lets it in", ticks, %ebx, 1
    BITS "the handler runs with IF clear", irq_live, $0x200, $0
    BITS "the interrupt frame shows cs", irq_cs, $0xffff, $KCODE
    call wait_pending
    movl ticks, %ebx
    pushl $0x202
    popfl
    movl ticks, %ecx
    cli
    ATLEAST "popf lets it in at once", %ecx, %ebx, 1
    call wait_pending
    movl ticks, %ebx
    sti
    hlt
1:  cli
    ATLEAST "sti, hlt wakes", ticks, %ebx, 1
    IS "hlt was left behind", irq_eip, $(1b - .Lbegin + BASE)
    # Five ticks asleep.
    movl ticks, %ebx
    movl $5, %ecx
2:  sti
    hlt
    cli
    loop 2b
    ATLEAST "hlt counts ticks", ticks, %ebx, 5
    # The timer ends an endless loop.
    movl $(3f - .Lbegin + BASE), resume_eip
    movl $3, break_after
    movl ticks, %ebx
    sti
1:  jmp 1b
3:  cli
    ATLEAST "the timer interrupts a loop", ticks, %ebx, 3
    IS "the loop was interrupted", break_eip, $(1b - .Lbegin + BASE)
    # Registers and flags survive interrupts.
    movl ticks, %ebx
    addl $3, %ebx
    movl $0x13579bdf, %esi
    movl $0x2468ace0, %edi
    xorl %ebp, %ebp
    sti
4:  stc
    adcl $0, %ebp
    pushfl
    cli
    pushfl
    popl %ecx
    popfl
    orl %ecx, scratch
    cmpl %ebx, ticks
    jb 4b
    pushfl
    popl %ecx
    cli
    BITS "IF survives interrupts", %ecx, $0x200, $0x200
    IS "esi survives interrupts", %esi, $0x13579bdf
    IS "edi survives interrupts", %edi, $0x2468ace0
    movb $0xff, %al
    outb %al, $0x21
    ret

check_user:
    movl $-1, last_vector
    movl $0, syscalls
    USER user_hello
    IS "int 80h ends the user", last_vector, $0x80
    IS "the user's second eip", last_eip, $user_hello_end
    BITS "the frame shows the user's cs", last_cs, $0xffff, $UCODE
    BITS "the frame shows the user's ss", last_ss, $0xffff, $UDATA
    IS "the frame shows the user's esp", last_esp, $USER_STACK
    BITS "the frame shows IF in the user", last_eflags, $0x3200, $0x200
    IS "the system call came back", syscalls, $1
    IS "the system call's value", user_ebx, $0x12345678
    BITS "the user's ds", user_ds, $0xffff, $UDATA
    IS "the user wrote its page", PAGE_USER, $0x0005e5e5
    USER user_flags
    BITS "the user's pushf shows IF", user_ebx, $0x200, $0x200
    BITS "the user's popf cannot change IF or IOPL", user_ecx, $0x3200, $0x200
    BITS "the user's popf sets AC and ID", user_ecx, $0x240000, $0x240000

    .irp name, cli, sti, hlt, clts, invd, wbinvd, lgdt, lidt, lldt, ltr, lmsw, invlpg, rdmsr, wrmsr, mov_cr0, mov_cr3, mov_cr4, to_cr0, to_cr3, mov_dr, to_dr, in, out, insb, outsb
    USER_FAULTS "user \name", 13, 0, u_\name, u_\name
    .endr
    BITS "the frame of a user fault shows IF", last_eflags, $0x200, $0x200
    USER_FAULTS "user int 30h", 13, 0x182, u_int30, u_int30
    USER_FAULTS "user int 31h, absent but first of ring 0", 13, 0x18a, u_int31, u_int31
    USER_FAULTS "user int3", 3, 0, u_int3, u_int3_end
    USER_FAULTS "user ud2", 6, 0, u_ud2, u_ud2
    USER_FAULTS "user divide by zero", 0, 0, u_div, u_div_at
    USER_FAULTS "user loads a kernel segment", 13, KDATA, u_kseg, u_kseg_at
    USER_FAULTS "user far jump to the kernel", 13, KCODE, u_kjump, u_kjump
    USER_FAULTS "user reads the kernel", 14, 5, u_read, u_read
    IS "cr2 of the user's read", last_cr2, $gdt
    USER_FAULTS "user writes the kernel", 14, 7, u_write, u_write
    USER_FAULTS "user reads not present", 14, 4, u_absent, u_absent
    USER_FAULTS "user jumps into the kernel", 14, 5, u_exec, check_user_target
    IS "cr2 of the user's jump", last_cr2, $check_user_target
    USER_FAULTS "user calls the gate and comes back", 0x80, 0, u_gate, u_gate_end
    IS "the gate's value", user_ecx, $0x9a7e
    USER_FAULTS "user out to an allowed port", 0x80, 0, u_bitmap, u_bitmap_end
    movl $-1, last_vector
    USER u_iopl, 0x3202
    IS "user cli with IOPL 3", last_vector, $0x80
    BITS "IF is clear after it", last_eflags, $0x3200, $0x3000
    movl %cr0, %eax
    orl $8, %eax
    movl %eax, %cr0
    USER_FAULTS "user x87 with TS", 7, 0, u_fpu, u_fpu
    clts
    USER_FAULTS "user x87 without TS", 0x80, 0, u_fpu, u_fpu_end
    # The timer takes the CPU from a user that loops.
    movb $0xfe, %al
    outb %al, $0x21
    movl $3, break_after
    movl ticks, %ebx
    USER u_loop
    movb $0xff, %al
    outb %al, $0x21
    addl $3, %ebx
    IS "the timer interrupts the user", ticks, %ebx
    BITS "the interrupted cs", break_cs, $0xffff, $UCODE
    pushfl
    popl %ecx
    BITS "back in the kernel with IF clear", %ecx, $0x200, $0
    movl %cs, %ecx
    BITS "back in the kernel", %ecx, $0xffff, $KCODE
    ret
    L check_user_target
    ret

check_double_fault:
    movl %esp, scratch
    # Under a hypervisor on QEMU's TCG no page of the task may be touched for the first time during the switch: a nested
    # page fault there makes TCG name the first fault, not the double fault, as what was being delivered.
    movl $0, DF_STACK - 4
    movl $(2f - .Lbegin + BASE), df_resume
    movl $0x80001000, %esp                # nothing is mapped there
    pushl %eax
    movl scratch, %esp
2:  IS "double fault through a task gate", df_count, $1
    BITS "NT in the double-fault task", df_flags, $0x4000, $0x4000
    BITS "TR in the double-fault task", df_tr, $0xffff, $TSS_DF
    BITS "a task switch sets TS", df_cr0, $8, $8
    str %cx
    BITS "TR after the return", %ecx, $0xffff, $TSS_MAIN
    pushfl
    popl %ecx
    BITS "NT after the return", %ecx, $0x4000, $0
    clts
    ret

    # In the double-fault task: sends the main task on at df_resume with its stack repaired.
    L df_entry
    popl %eax                             # error code 0
    incl df_count
    pushfl
    popl df_flags
    str %cx
    movw %cx, df_tr
    movl %cr0, %eax
    movl %eax, df_cr0
    movl df_resume, %eax
    movl %eax, tss_eip
    movl scratch, %eax
    movl %eax, tss_esp
    iretl
    jmp .L_df_entry                       # where the task goes on if it is entered again

    .subsection 1
    .balign 4
    L df_resume
    .long 0
    .subsection 0

    # User code, in pages of its own.
    .balign 4096
    L user_begin
    .macro U name
    L \name
    .endm
    U user_hello
    movl $0x5e5e5, PAGE_USER
    movl $1, %eax
    int $0x80
    movl %eax, %ebx
    xorl %eax, %eax
    int $0x80
    U user_hello_end
    U user_flags
    pushfl
    popl %ebx
    pushl $0x243002
    popfl
    pushfl
    popl %ecx
    pushl $2
    popfl
    xorl %eax, %eax
    int $0x80
    .macro UONE name, insn:vararg
    L u_\name
    \insn
    ud2
    .endm
    UONE cli, cli
    UONE sti, sti
    UONE hlt, hlt
    UONE clts, clts
    UONE invd, invd
    UONE wbinvd, wbinvd
    UONE lgdt, lgdtl PAGE_USER
    UONE lidt, lidtl PAGE_USER
    UONE lldt, lldt %ax
    UONE ltr, ltr %ax
    UONE lmsw, lmsw %ax
    UONE invlpg, invlpg PAGE_USER
    UONE rdmsr, rdmsr
    UONE wrmsr, wrmsr
    UONE mov_cr0, movl %cr0, %eax
    UONE mov_cr3, movl %cr3, %eax
    UONE mov_cr4, movl %cr4, %eax
    UONE to_cr0, movl %eax, %cr0
    UONE to_cr3, movl %eax, %cr3
    UONE mov_dr, movl %dr0, %eax
    UONE to_dr, movl %eax, %dr7
    UONE in, inb $0x60, %al
    UONE out, outb %al, $0x21
    UONE insb, insb
    UONE outsb, outsb
    UONE int30, int $0x30
    UONE int31, int $0x31
    UONE ud2, ud2
    UONE kjump, ljmp $KCODE, $0
    UONE read, movl gdt, %eax
    UONE write, movl %eax, gdt
    UONE absent, movl TEST + 0x5000, %eax
    UONE exec, jmp .L_check_user_target
    U u_int3
    int3
    U u_int3_end
    ud2
    U u_div
    xorl %ecx, %ecx
    U u_div_at
    divl %ecx
    U u_kseg
    movl $KDATA, %eax
    U u_kseg_at
    movw %ax, %ds
    U u_gate
    lcall $(GATE | 3), $0
    xorl %eax, %eax
    int $0x80
    U u_gate_end
    U u_bitmap
    outb %al, $0x80
    xorl %eax, %eax
    int $0x80
    U u_bitmap_end
    U u_iopl
    cli
    inb $0x61, %al
    xorl %eax, %eax
    int $0x80
    U u_fpu
    fld1
    fstps PAGE_USER
    xorl %eax, %eax
    int $0x80
    U u_fpu_end
    U u_loop
    jmp .L_u_loop
    L user_end
    .balign 4096

    # The strings and tables of subsection 1 follow here.
    .subsection 2
    .balign 16
.Lend:
    .globl subring_builtin_guest_begin, subring_builtin_guest_end
    .hidden subring_builtin_guest_begin, subring_builtin_guest_end
    .set subring_builtin_guest_begin, .Lbegin
    .set subring_builtin_guest_end, .Lend
    # Macros would be seen by whatever assembly follows.
    .purgem L
    .purgem TEXT
    .purgem EXPECT
    .purgem IS
    .purgem BITS
    .purgem ATLEAST
    .purgem FAULTED
    .purgem FAULTS
    .purgem TRAPS
    .purgem USER
    .purgem USER_FAULTS
    .purgem FLAGS
    .purgem LIMIT
    .purgem VERIFY
    .purgem CODE
    .purgem SNIPPET
    .purgem SNIPPET_END
    .purgem U
    .purgem UONE
    .purgem V86
    .purgem V86_TRAPS
    .purgem V
    .purgem VONE
    .code64
    .popsection
