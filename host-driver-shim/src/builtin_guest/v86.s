# The built-in guest, part 5: virtual-8086 mode (SDM Vol. 3B, chapter 21), entered by iret from ring 0.
#
# The 16-bit program is copied to 20000h; its data and stack are at 21000h. Each check enters it at a label and ends
# with a trap, whose frame has the segment registers above the usual ones.

    .set V86_CODE, 0x20000
    .set V86_DATA, 0x21000
    .set V86_CS,   V86_CODE >> 4
    .set V86_DS,   V86_DATA >> 4
    .set V86_SP,   0xe00
    .set VM0,      0x20202            # VM, IF
    .set VM3,      0x23202            # VM, IF, IOPL 3

    .macro V86 code, flags
    movl $\code, user_eip
    movl $\flags, user_eflags
    movl $-1, last_vector
    call run_v86
    .endm

    .macro V86_TRAPS text, vec, err, flags, code, at
    V86 \code, \flags
    FAULTED "v86: \text", ((\vec << 16) | (\err)), \at
    .endm

run_v86:                                  # user_eip, user_eflags; comes back through leave_user
    pushal
    movl %esp, kernel_esp
    leal -64(%esp), %eax
    movl %eax, tss_esp0
    movl $0x11111111, user_eax
    pushl $0x2102                         # GS
    pushl $0x2101                         # FS
    pushl $V86_DS
    pushl $0x2010                         # ES
    pushl $V86_DS                         # SS
    pushl $V86_SP
    pushl user_eflags
    pushl $V86_CS
    pushl user_eip
    movl $0x4321, %ecx
    iretl

check_v86:
    movb $0xff, %al
    outb %al, $0x21
    movl $v86_begin, %esi
    movl $V86_CODE, %edi
    movl $(.Lv86_end - .Lv86_begin), %ecx
    rep movsb
    orl $4, TABLE_0 + (V86_CODE >> 12) * 4
    orl $4, TABLE_0 + (V86_DATA >> 12) * 4
    movl %cr3, %eax
    movl %eax, %cr3
    movl $0, V86_DATA + 0x10

    V86_TRAPS "hlt", 13, 0, VM0, v_hello, v_hello_hlt
    BITS "v86: the frame shows VM and IF", last_eflags, $0x23200, $0x20200
    IS "v86: the frame shows cs", last_cs, $V86_CS
    IS "v86: the frame shows sp", last_esp, $V86_SP
    IS "v86: the frame shows ss", last_ss, $V86_DS
    IS "v86: the frame shows es", v86_es, $0x2010
    IS "v86: the frame shows ds", v86_ds, $V86_DS
    IS "v86: the frame shows fs", v86_fs, $0x2101
    IS "v86: the frame shows gs", v86_gs, $0x2102
    BITS "v86: the handler gets a null ds", user_ds, $0xffff, $0
    BITS "v86: mov of a segment register", user_eax, $0xffff, $V86_DS
    BITS "v86: registers come in", user_ecx, $0xffff, $0x4321
    IS "v86: stores go to segment * 16", V86_DATA + 0x10, $0x43211234
    movl %cs, %ecx
    BITS "v86: back in ring 0", %ecx, $0xffff, $KCODE
    pushfl
    popl %ecx
    BITS "v86: back with VM and IF clear", %ecx, $0x20200, $0

    .irp name, cli, sti, pushf, popf, iret, int21
    V86_TRAPS "\name with IOPL 0", 13, 0, VM0, v_\name, v_\name
    .endr
    V86_TRAPS "int3 with IOPL 0", 3, 0, VM0, v_int3, v_int3_end
    V86_TRAPS "int 80h with IOPL 3", 0x80, 0, VM3, v_int80, v_int80_end
    BITS "v86: int 80h shows VM and IOPL", last_eflags, $0x23000, $0x23000
    V86_TRAPS "int 30h with IOPL 3, a gate of ring 0", 13, 0x182, VM3, v_int30, v_int30
    V86_TRAPS "flags with IOPL 3", 13, 0, VM3, v_flags, v_flags_hlt
    BITS "v86: pushf after cli", user_eax, $0x3200, $0x3000
    BITS "v86: pushf after sti", user_ebx, $0x3200, $0x3200
    BITS "v86: popf changes IF but not IOPL", user_ecx, $0x3200, $0x3000
    V86_TRAPS "iret with IOPL 3", 13, 0, VM3, v_iret3, v_iret3_hlt
    BITS "v86: iret loads flags but not IOPL", last_eflags, $0x23201, $0x23001

    V86_TRAPS "out to an allowed port", 13, 0, VM0, v_out, v_out_hlt
    V86_TRAPS "in from a refused port, IOPL 3 or not", 13, 0, VM3, v_in, v_in
    V86_TRAPS "lldt is not for this mode", 6, 0, VM0, v_lldt, v_lldt
    V86_TRAPS "lar is not for this mode", 6, 0, VM0, v_lar, v_lar
    V86_TRAPS "mov from cr0", 13, 0, VM3, v_cr0, v_cr0
    V86_TRAPS "clts", 13, 0, VM3, v_clts, v_clts
    V86_TRAPS "far transfers", 13, 0, VM0, v_far, v_far_hlt
    BITS "v86: far call pushes cs", user_eax, $0xffff, $V86_CS
    IS "v86: far jump to another segment", last_cs, $(V86_CS + 1)
    V86_TRAPS "string move", 13, 0, VM0, v_movs, v_movs_hlt
    BITS "v86: rep movsb through ds and es", 0x20110, $0xffffffff, $0x44332211
    V86_TRAPS "32-bit operands", 13, 0, VM0, v_wide, v_wide_hlt
    IS "v86: eax", user_eax, $0x89abcdef
    V86_TRAPS "a page of ring 0", 14, 5, VM0, v_page, v_page_at
    IS "v86: cr2", last_cr2, $0x22010
    # popf in ring 0 cannot enter the mode.
    pushl $0x20002
    popfl
    pushfl
    popl %ecx
    BITS "v86: popf of ring 0 leaves VM", %ecx, $0x20000, $0

    # What a monitor does: the int that trapped goes to the program's own handler, which ends with iret, which traps.
    V86_TRAPS "int 21h to be reflected", 13, 0, VM0, v_int21, v_int21
    V86_TRAPS "the reflected handler", 13, 0, VM0, v_handler, v_handler_iret
    BITS "v86: the handler's value", user_eax, $0xffff, $0x2121

    # Long enough for an engine that cannot do it to be replaced by one that can.
    V86_TRAPS "a loop", 13, 0, VM0, v_count, v_count_hlt
    BITS "v86: the loop came to its end", user_ecx, $0xffff, $0

    # The timer takes the CPU from a loop.
    movb $0xfe, %al
    outb %al, $0x21
    movl $2, break_after
    movl ticks, %ebx
    V86 v_loop, VM0
    movb $0xff, %al
    outb %al, $0x21
    ATLEAST "v86: the timer interrupts", ticks, %ebx, 2
    IS "v86: the interrupted cs", break_cs, $V86_CS
    IS "v86: the interrupted ip", break_eip, $v_loop
    andl $~4, TABLE_0 + (V86_CODE >> 12) * 4
    andl $~4, TABLE_0 + (V86_DATA >> 12) * 4
    movl %cr3, %eax
    movl %eax, %cr3
    ret

    .subsection 1
    .balign 4
    .irp name, v86_es, v86_ds, v86_fs, v86_gs
    L \name
    .long 0
    .endr
    .macro V name
.L_\name:
    .set \name, .L_\name - .Lv86_begin
    .endm
    L v86_begin
    .code16
.Lv86_begin:
    V v_hello
    movw $0x1234, %ax
    movw %ax, 0x10
    movw %cx, 0x12
    movw %ds, %ax
    V v_hello_hlt
    hlt
    .macro VONE name, insn:vararg
    V v_\name
    \insn
    hlt
    .endm
    VONE cli, cli
    VONE sti, sti
    VONE pushf, pushfw
    VONE popf, popfw
    VONE iret, iretw
    VONE int21, int $0x21
    VONE int30, int $0x30
    VONE in, inb $0x21, %al
    VONE lldt, .byte 0x0f, 0x00, 0xd0
    VONE lar, .byte 0x0f, 0x02, 0xc0
    VONE cr0, movl %cr0, %eax
    VONE clts, clts
    V v_count
    movw $5000, %cx
.Lv_again:
    loop .Lv_again
    V v_count_hlt
    hlt
    V v_int3
    int3
    V v_int3_end
    hlt
    V v_int80
    int $0x80
    V v_int80_end
    hlt
    V v_flags
    cli
    pushfw
    popw %ax
    sti
    pushfw
    popw %bx
    pushw $0x0002
    popfw
    pushfw
    popw %cx
    V v_flags_hlt
    hlt
    V v_iret3
    pushw $0x0003
    pushw $V86_CS
    pushw $v_iret3_hlt
    iretw
    V v_iret3_hlt
    hlt
    V v_out
    outb %al, $0x80
    V v_out_hlt
    hlt
    V v_far
    .byte 0x9a                            # lcall V86_CS:v_far_callee
    .word v_far_callee, V86_CS
    .byte 0xea                            # ljmp V86_CS + 1:v_far_hlt
    .word v_far_hlt, V86_CS + 1
    V v_far_callee
    movw %sp, %bp
    movw 2(%bp), %ax
    lretw
    .balign 16
    .set v_far_hlt, . - .Lv86_begin - 16
    hlt
    V v_movs
    movw $0x2211, 0x20
    movw $0x4433, 0x22
    movw $0x20, %si
    movw $0x10, %di                       # es:10h = 20110h
    movw $4, %cx
    cld
    rep movsb
    V v_movs_hlt
    hlt
    V v_wide
    movl $0x89abcdef, %eax
    V v_wide_hlt
    hlt
    V v_page
    movw $0x2200, %ax
    movw %ax, %ds
    V v_page_at
    movw 0x10, %ax
    hlt
    V v_handler
    movw $0x2121, %ax
    V v_handler_iret
    iretw
    V v_loop
    jmp .L_v_loop
.Lv86_end:
    .code32
    .subsection 0
