# The built-in guest, part 1: layout, Multiboot header, entry, tables, macros of the checks.
#
# 32-bit AT&T syntax. The image is linked into a 64-bit program at an unknown place and loaded at 1 MiB, so no
# address may be left to the linker: a label whose address is used is declared with `L name`, which also makes
# `.L_name` for branches; `name` is then an absolute number the assembler works out itself.
#
# Physical memory: 100000h image, 140000h..180000h tables, test pages and stacks (cleared by the loader as bss).

    .pushsection .rodata.subring_builtin_guest, "a", @progbits
    .code32
    .balign 4096

    .set BASE,        0x100000
    .set PAGE_DIR,    0x140000
    .set TABLE_0,     0x141000        # linear 0..4 MiB, identity
    .set TABLE_1,     0x142000        # linear 40000000h, test mappings
    .set PAGE_A,      0x150000        # test pages
    .set PAGE_B,      0x151000
    .set PAGE_CODE,   0x152000        # code written at run time
    .set PAGE_USER,   0x153000        # data the user may touch
    .set DF_STACK,    0x155000        # top
    .set STACK,       0x160000        # top
    .set USER_STACK,  0x168000        # top; page 167000h belongs to the user
    .set BSS_END,     0x180000
    .set TEST,        0x40000000      # linear, TABLE_1
    .set ALIAS,       0xc0000000      # linear, the first 4 MiB again

    .set KCODE, 0x08
    .set KDATA, 0x10
    .set UCODE, 0x1b
    .set UDATA, 0x23
    .set TSS_MAIN, 0x28
    .set LDT_SEL,  0x30
    .set TLS,      0x38               # 16 bytes at tls_area
    .set ABSENT,   0x40               # data, not present
    .set RODATA,   0x48               # data, read-only, flat
    .set CONFORM,  0x50               # code, conforming, flat
    .set TSS_DF,   0x58
    .set SHORTSS,  0x60               # stack, limit 15ffffh
    .set GATE,     0x68               # call gate to KCODE, DPL 3
    .set ABSCODE,  0x70               # code, not present
    .set FRESH,    0x78               # data, not yet accessed
    .set NEGTLS,   0x80               # data, base tls_area + 16, limit 4 GiB
    .set DOWN,     0x88               # data, expand-down, limit fffh
    .set CODE16,   0x90               # code, 16 bits, base BASE
    .set OUTSIDE,  0x4000             # beyond the GDT

    .set EXIT_PORT, 0x501
    .set COM1,      0x3f8

    .macro L name
.L_\name:
    .set \name, .L_\name - .Lbegin + BASE
    .endm

    # A string among the data; `label` becomes its address.
    .macro TEXT label, text
    .subsection 1
    .L_t_\label:
    .set \label, .L_t_\label - .Lbegin + BASE
    .asciz "\text"
    .subsection 0
    .endm

    # EAX must equal EDX. Keeps every register.
    .macro EXPECT text
    TEXT str_\@, "\text"
    movl $str_\@, check_name
    call check
    .endm

    # A register or constant must be this.
    .macro IS text, got, want
    pushl %eax
    pushl %edx
    movl \got, %eax
    movl \want, %edx
    EXPECT "\text"
    popl %edx
    popl %eax
    .endm

    # Only these bits of a register or memory word count.
    .macro BITS text, got, mask, want
    pushl %eax
    pushl %edx
    movl \got, %eax
    andl \mask, %eax
    movl \want, %edx
    EXPECT "\text"
    popl %edx
    popl %eax
    .endm

    # A counter must be at least `n` beyond `base`: a slow machine may see more ticks, never fewer.
    .macro ATLEAST text, got, base, n
    pushl %eax
    pushl %edx
    movl \got, %eax
    subl \base, %eax
    cmpl $\n, %eax
    setge %al
    movzbl %al, %eax
    movl $1, %edx
    EXPECT "\text"
    popl %edx
    popl %eax
    .endm

    .macro FAULTED text, want, eip
    movl $\eip, want_eip
    movl $\want, want_trap
    TEXT str_\@, "\text"
    movl $str_\@, check_name
    call check_trap
    .endm

    # One instruction that must raise vector and error code `vec`, `err`, with EIP at the instruction.
    .macro FAULTS text, vec, err, insn:vararg
    movl $(992f - .Lbegin + BASE), resume_eip
    movl $-1, last_vector
991:
    \insn
992:
    FAULTED "\text", ((\vec << 16) | (\err)), (991b - .Lbegin + BASE)
    .endm

    # The same for traps, which report the EIP after the instruction.
    .macro TRAPS text, vec, insn:vararg
    movl $(992f - .Lbegin + BASE), resume_eip
    movl $-1, last_vector
    \insn
992:
    FAULTED "\text", (\vec << 16), (992b - .Lbegin + BASE)
    .endm

    # Runs user code at label `code` until it traps; what it did is in last_* and user_*.
    .macro USER code, flags=0x202
    movl $\code, user_eip
    movl $\flags, user_eflags
    call run_user
    .endm

    .macro USER_FAULTS text, vec, err, code, at
    movl $-1, last_vector
    USER \code
    FAULTED "\text", ((\vec << 16) | (\err)), \at
    .endm

.Lbegin:
    # Multiboot 1 header with the a.out kludge: addresses here instead of an ELF header (Multiboot 0.6.96, 3.1).
    .balign 4
    .long 0x1badb002
    .long 0x00010000
    .long -(0x1badb002 + 0x00010000)
    .long BASE                            # header_addr
    .long BASE                            # load_addr
    .long .Lend - .Lbegin + BASE          # load_end_addr
    .long BSS_END                         # bss_end_addr
    .long entry                           # entry_addr

    L entry
    cli
    cld
    cmpl $0x2badb002, %eax
    sete %bl
    movl $STACK, %esp
    lgdtl gdt_pointer
    ljmp $KCODE, $after_gdt
    L after_gdt
    movw $KDATA, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %fs
    movw %ax, %gs
    movw %ax, %ss
    pushl $2
    popfl
    call serial_init
    movl $banner, %esi
    call puts
    call build_idt
    lidtl idt_pointer
    movw $LDT_SEL, %ax
    lldt %ax
    movw $TSS_MAIN, %ax
    ltr %ax
    call pic_init
    movzbl %bl, %eax
    IS "multiboot magic", %eax, $1

    call check_registers
    call check_flags
    call check_traps
    call check_segments
    call check_transfers
    call check_io
    call paging_on
    call check_paging
    call check_code
    call check_interrupts
    call check_user
    call check_v86
    call check_double_fault

    movl $verdict_pass, %esi
    cmpl $0, failures
    je 1f
    movl $verdict_fail, %esi
    call puts
    movl failures, %eax
    call print_decimal
    movl $verdict_of, %esi
    call puts
    movl checks, %eax
    call print_decimal
    movl $verdict_end, %esi
    call puts
    movb $0x11, %al
    jmp 2f
1:  call puts
    movl checks, %eax
    call print_decimal
    movl $verdict_checks, %esi
    call puts
    movb $0x10, %al
2:  movw $EXIT_PORT, %dx
    outb %al, %dx
3:  cli                                   # nobody listens at the exit port: halt for ever
    hlt
    jmp 3b

    TEXT banner, "subring built-in guest\n"
    TEXT verdict_pass, "VERDICT: PASS ("
    TEXT verdict_checks, " checks)\n"
    TEXT verdict_fail, "VERDICT: FAIL ("
    TEXT verdict_of, " of "
    TEXT verdict_end, ")\n"

    .subsection 1
    .balign 8
    L gdt
    .quad 0
    .quad 0x00cf9b000000ffff              # KCODE
    .quad 0x00cf93000000ffff              # KDATA
    .quad 0x00cffb000000ffff              # UCODE
    .quad 0x00cff3000000ffff              # UDATA
    .word tss_end - tss - 1, (.L_tss - .Lbegin) & 0xffff, 0x8900 | (BASE >> 16), 0
    .word 0x000f, (.L_ldt - .Lbegin) & 0xffff, 0x8200 | (BASE >> 16), 0
    .word 0x000f, (.L_tls_area - .Lbegin) & 0xffff, 0x9300 | (BASE >> 16), 0x0040
    .quad 0x00cf13000000ffff              # ABSENT
    .quad 0x00cf91000000ffff              # RODATA
    .quad 0x00cf9f000000ffff              # CONFORM
    .word 0x0067, (.L_df_tss - .Lbegin) & 0xffff, 0x8900 | (BASE >> 16), 0
    .quad 0x00c093000000015f              # SHORTSS
    .word (.L_gate_target - .Lbegin) & 0xffff, KCODE, 0xec00, BASE >> 16
    .quad 0x00cf1b000000ffff              # ABSCODE
    .quad 0x00cf92000000ffff              # FRESH
    .word 0xffff, (.L_tls_area - .Lbegin + 16) & 0xffff, 0x9300 | (BASE >> 16), 0x00cf
    .quad 0x0040970000000fff              # DOWN
    .word 0xffff, 0, 0x9b00 | (BASE >> 16), 0x0000
    L gdt_end
    L ldt
    .quad 0
    .word 0x00ff, (.L_tls_area - .Lbegin) & 0xffff, 0x9300 | (BASE >> 16), 0x0040
    L tls_area
    .long 0x11111111, 0x22222222, 0x33333333, 0x44444444, 0x55555555
    .balign 4
    .word 0
    L gdt_pointer
    .word gdt_end - gdt - 1
    .long gdt
    .word 0
    L idt_pointer
    .word 0x82 * 8 - 1
    .long idt
    .balign 4
    L tss                                 # SDM Vol. 3A, figure 7-2
    .long 0
    L tss_esp0
    .long STACK
    .long KDATA
    .long 0, 0, 0, 0
    .long PAGE_DIR                        # CR3
    L tss_eip
    .long 0, 0, 0, 0, 0, 0
    L tss_esp
    .long 0, 0, 0, 0
    .long 0, 0, 0, 0, 0, 0
    .long LDT_SEL
    .word 0, 0x68                         # I/O bitmap
    .fill 16, 1, 0xff                     # ports 0..7fh: refused
    .byte 0xfe                            # port 80h: allowed
    .fill 111, 1, 0xff
    .byte 0xff
    L tss_end
    .balign 4
    L df_tss
    .long 0, DF_STACK, KDATA, 0, 0, 0, 0
    .long PAGE_DIR
    .long df_entry, 2, 0, 0, 0, 0
    .long DF_STACK, 0, 0, 0
    .long KDATA, KCODE, KDATA, KDATA, KDATA, KDATA
    .long 0
    .word 0, 0x68
    .balign 8
    L idt
    .fill 0x82, 8, 0
    .balign 4
    .irp name, check_name, checks, failures, want_eip, want_trap, resume_eip, last_vector, last_error, last_eip, last_cs, last_eflags, last_cr2, last_live, last_esp, last_ss, ticks, irq_eip, irq_cs, irq_live, break_after, kernel_esp, user_eip, user_eflags, user_eax, user_ebx, user_ecx, user_edx, user_ds, syscalls, scratch, scratch2, df_count, df_flags, df_tr, df_cr0, have_pse, no_limits, break_eip, break_cs
    L \name
    .long 0
    .endr
    L scratch_buffer
    .fill 32, 1, 0
    .subsection 0
