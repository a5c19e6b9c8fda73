# The built-in guest, part 2: serial output, trap stubs, the checks' bookkeeping, entering user mode.

serial_init:
    movw $(COM1 + 1), %dx
    xorb %al, %al
    outb %al, %dx
    movw $(COM1 + 3), %dx
    movb $0x80, %al
    outb %al, %dx
    movw $COM1, %dx
    movb $1, %al
    outb %al, %dx
    incw %dx
    xorb %al, %al
    outb %al, %dx
    movw $(COM1 + 3), %dx
    movb $3, %al
    outb %al, %dx
    ret

putc:                                     # AL
    pushl %edx
    pushl %eax
    movw $(COM1 + 5), %dx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    popl %eax
    movw $COM1, %dx
    outb %al, %dx
    popl %edx
    ret

puts:                                     # ESI
    lodsb
    testb %al, %al
    jz 1f
    call putc
    jmp puts
1:  ret

print_hex:                                # EAX
    movl $8, %ecx
1:  roll $4, %eax
    pushl %eax
    andb $15, %al
    cmpb $10, %al
    jb 2f
    addb $('a' - '0' - 10), %al
2:  addb $'0', %al
    call putc
    popl %eax
    loop 1b
    ret

print_decimal:                            # EAX
    xorl %edx, %edx
    movl $10, %ecx
    divl %ecx
    pushl %edx
    testl %eax, %eax
    jz 1f
    call print_decimal
1:  popl %eax
    addb $'0', %al
    call putc
    ret

check:                                    # EAX got, EDX want, check_name
    pushal
    incl checks
    cmpl %edx, %eax
    jne 1f
    movl $text_ok, %esi
    call puts
    movl check_name, %esi
    call puts
    jmp 2f
1:  incl failures
    pushl %edx
    pushl %eax
    movl $text_fail, %esi
    call puts
    movl check_name, %esi
    call puts
    movl $text_got, %esi
    call puts
    popl %eax
    call print_hex
    movl $text_want, %esi
    call puts
    popl %eax
    call print_hex
2:  movb $10, %al
    call putc
    popal
    ret

check_trap:                               # vector and error code as want_trap says, at want_eip
    pushal
    movl $0, resume_eip
    movl last_vector, %eax
    shll $16, %eax
    movw last_error, %ax
    movl want_trap, %edx
    cmpl %edx, %eax
    jne 1f
    movl last_eip, %ecx
    cmpl want_eip, %ecx
    je 1f
    movl %ecx, %eax                       # right trap, wrong place: show the places
    movl want_eip, %edx
1:  call check
    popal
    ret

say_skip:                                 # ESI
    pushl %esi
    movl $text_skip, %esi
    call puts
    popl %esi
    call puts
    movb $10, %al
    call putc
    ret

    TEXT text_ok, "ok "
    TEXT text_fail, "FAIL "
    TEXT text_got, " got="
    TEXT text_want, " want="
    TEXT text_skip, "skip "
    TEXT text_unexpected, "FAIL unexpected trap: vector, error code, eip, cr2 = "

    # Trap stubs: [vector][error code][eip][cs][eflags]([esp][ss])
    .irp n, 0,1,2,3,4,5,6,7,9,15,16,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40,41,42,43,44,45,46,47,48,128,129
.Lstub_\n:
    pushl $0
    pushl $\n
    jmp trap_common
    .endr
    .irp n, 8,10,11,12,13,14,17
.Lstub_\n:
    pushl $\n
    jmp trap_common
    .endr

trap_common:
    pushal
    pushl %ds
    pushl %es
    pushfl
    movw $KDATA, %ax
    movw %ax, %ds
    movw %ax, %es
    cld
    popl %ebx                             # the flags the handler runs with
    movl 40(%esp), %eax
    leal -32(%eax), %ecx
    cmpl $16, %ecx
    jb irq_common
    movl %ebx, last_live
    movl %eax, last_vector
    movl 44(%esp), %eax
    movl %eax, last_error
    movl 48(%esp), %eax
    movl %eax, last_eip
    movl 52(%esp), %eax
    movl %eax, last_cs
    movl 56(%esp), %eax
    movl %eax, last_eflags
    movl %cr2, %eax
    movl %eax, last_cr2
    testl $0x20000, 56(%esp)
    jnz trap_from_v86
    testl $3, 52(%esp)
    jnz trap_from_user
    movl resume_eip, %eax
    testl %eax, %eax
    jz unexpected
    movl %eax, 48(%esp)
    movl $0, resume_eip
    andl $~0x100, 56(%esp)                # one step is enough
trap_return:
    popl %es
    popl %ds
    popal
    addl $8, %esp
    iretl

trap_from_user:
    cmpl $0x80, last_vector
    jne leave_user
    cmpl $1, 36(%esp)                     # system call 1 comes back with a value
    jne leave_user
    incl syscalls
    movl $0x12345678, 36(%esp)
    jmp trap_return

trap_from_v86:                            # [es][ds][fs][gs] above the frame
    movl 68(%esp), %eax
    movl %eax, v86_es
    movl 72(%esp), %eax
    movl %eax, v86_ds
    movl 76(%esp), %eax
    movl %eax, v86_fs
    movl 80(%esp), %eax
    movl %eax, v86_gs
leave_user:                               # the user's registers into memory, then back to run_user's caller
    movl 36(%esp), %eax
    movl %eax, user_eax
    movl 32(%esp), %eax
    movl %eax, user_ecx
    movl 28(%esp), %eax
    movl %eax, user_edx
    movl 24(%esp), %eax
    movl %eax, user_ebx
    movl 4(%esp), %eax
    movl %eax, user_ds
    movl 60(%esp), %eax
    movl %eax, last_esp
    movl 64(%esp), %eax
    movl %eax, last_ss
    movw $KDATA, %ax
    movw %ax, %fs
    movw %ax, %gs
    movl kernel_esp, %esp
    popal
    ret

run_user:                                 # user_eip, user_eflags
    pushal
    movl %esp, kernel_esp
    leal -64(%esp), %eax
    movl %eax, tss_esp0
    movl $UDATA, %eax
    movw %ax, %fs
    movw %ax, %gs
    pushl %eax
    pushl $USER_STACK
    pushl user_eflags
    pushl $UCODE
    pushl user_eip
    movw %ax, %ds
    movw %ax, %es
    iretl

irq_common:
    movl %ebx, irq_live
    movl 48(%esp), %edx
    movl %edx, irq_eip
    movl 52(%esp), %edx
    movl %edx, irq_cs
    cmpl $32, %eax
    jne 1f
    incl ticks
1:  movb $0x20, %al
    cmpl $8, %ecx
    jb 2f
    outb %al, $0xa0
2:  outb %al, $0x20
    cmpl $0, break_after
    je trap_return
    decl break_after
    jnz trap_return
    movl irq_eip, %eax
    movl %eax, break_eip
    movl irq_cs, %eax
    movl %eax, break_cs
    testl $0x20000, 56(%esp)
    jnz leave_user
    testl $3, 52(%esp)
    jnz leave_user
    movl resume_eip, %eax
    testl %eax, %eax
    jz trap_return
    movl %eax, 48(%esp)
    movl $0, resume_eip
    jmp trap_return

unexpected:
    movl $text_unexpected, %esi
    call puts
    .irp what, last_vector, last_error, last_eip, last_cr2
    movl \what, %eax
    call print_hex
    movb $' ', %al
    call putc
    .endr
    movb $10, %al
    call putc
    incl failures
    movb $0x11, %al
    movw $EXIT_PORT, %dx
    outb %al, %dx
1:  cli
    hlt
    jmp 1b

    # Gate type 8eh: interrupt gate, DPL 0. User may call 3, 4, 5 and 80h; 80h is a trap gate; 8 is a task gate;
    # 31h stays absent.
build_idt:
    movl $stub_table, %esi
1:  lodsl
    testl %eax, %eax
    js 2f
    movl %eax, %edi
    lodsl
    leal idt(,%edi,8), %edi
    movw %ax, (%edi)
    movw $KCODE, 2(%edi)
    movw $0x8e00, 4(%edi)
    shrl $16, %eax
    movw %ax, 6(%edi)
    jmp 1b
2:  movb $0xee, idt + 3 * 8 + 5
    movb $0xee, idt + 4 * 8 + 5
    movb $0xef, idt + 0x80 * 8 + 5
    movw $TSS_DF, idt + 8 * 8 + 2
    movw $0x8500, idt + 8 * 8 + 4
    movw $0x0e00, idt + 0x31 * 8 + 4
    ret

    .subsection 1
    .balign 4
    L stub_table
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40,41,42,43,44,45,46,47,48,128,129
    .long \n, .Lstub_\n - .Lbegin + BASE
    .endr
    .long -1
    .subsection 0

    # 8259A pair at vectors 20h and 28h, everything masked; 8254 channel 0 at 250 Hz.
pic_init:
    movb $0x11, %al
    outb %al, $0x20
    outb %al, $0xa0
    movb $0x20, %al
    outb %al, $0x21
    movb $0x28, %al
    outb %al, $0xa1
    movb $4, %al
    outb %al, $0x21
    movb $2, %al
    outb %al, $0xa1
    movb $1, %al
    outb %al, $0x21
    outb %al, $0xa1
    movb $0xff, %al
    outb %al, $0x21
    outb %al, $0xa1
    movb $0x34, %al
    outb %al, $0x43
    movb $(4773 & 0xff), %al
    outb %al, $0x40
    movb $(4773 >> 8), %al
    outb %al, $0x40
    ret

    # Linear 0..4 MiB identity in 4 KiB pages, of which the user owns its code, its stack and PAGE_USER; TEST through
    # TABLE_1; ALIAS as one 4 MiB page where there is PSE, else through TABLE_0 again.
paging_on:
    movl $TABLE_0, %edi
    movl $3, %eax
    movl $1024, %ecx
1:  stosl
    addl $0x1000, %eax
    loop 1b
    movl $user_begin, %eax
2:  movl %eax, %ecx
    shrl $12, %ecx
    orl $4, TABLE_0(,%ecx,4)
    addl $0x1000, %eax
    cmpl $user_end, %eax
    jb 2b
    orl $4, TABLE_0 + ((USER_STACK - 0x1000) >> 12) * 4
    orl $4, TABLE_0 + (PAGE_USER >> 12) * 4
    movl $(TABLE_0 + 7), PAGE_DIR
    movl $(TABLE_1 + 7), PAGE_DIR + (TEST >> 22) * 4
    movl $(TABLE_0 + 3), PAGE_DIR + (ALIAS >> 22) * 4
    movl $1, %eax
    cpuid
    testl $8, %edx
    jz 3f
    incl have_pse
    movl %cr4, %eax
    orl $0x10, %eax
    movl %eax, %cr4
    movl $0x83, PAGE_DIR + (ALIAS >> 22) * 4
3:  movl $PAGE_DIR, %eax
    movl %eax, %cr3
    movl %cr0, %eax
    orl $0x80010000, %eax                 # PG, WP
    movl %eax, %cr0
    jmp 4f
4:  ret
