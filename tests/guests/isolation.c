/* What a program sees when it reaches for the kernel's half of its address space, in every addressing form.
 *
 * No C library, like rows.c. Every form is tried at every address; the signal's numbers, CR2, the error code and EIP
 * must be what bare metal under the same kernel gives. Only a form whose signal came counts as blocked. Lines:
 *     ISOLATION ok NAME n                 n addresses, all as on bare metal
 *     ISOLATION FAIL NAME ADDRESS what    not so
 *     ISOLATION gap NAME ADDRESS VALUE    a form that docs/decisions/0003 says segment limits do not stop has read VALUE
 *     ISOLATION note NAME what            a documented limit shows, or something cannot be tried here
 *     ISOLATION-END ok failed gaps
 *
 * Usage: isolation [hexadecimal kernel addresses to try as well]
 */
typedef unsigned int u32;
typedef unsigned char u8;

enum { NR_exit = 1, NR_fork = 2, NR_waitpid = 7, NR_alarm = 27, NR_read = 3, NR_write = 4, NR_open = 5, NR_getppid = 64, NR_modify_ldt = 123, NR_rt_sigaction = 174,
       NR_nanosleep = 162, NR_getcwd = 183, NR_sigaltstack = 186, NR_mmap2 = 192, NR_set_thread_area = 243 };
enum { EFAULT = 14, SEGV_MAPERR = 1, SEGV_ACCERR = 2, SI_KERNEL = 0x80, KERNEL = 0xc0000000, LAST_PAGE = 0xbffff000 };

static long sys(long nr, long a, long b, long c)
{
    long ret;
    __asm__ volatile("int $0x80" : "=a"(ret) : "a"(nr), "b"(a), "c"(b), "d"(c) : "memory");
    return ret;
}

/* gcc may emit calls to these. */
void *memset(void *to, int value, unsigned long n)
{
    void *ret = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
    return ret;
}
void *memcpy(void *to, const void *from, unsigned long n)
{
    void *ret = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    return ret;
}

static char line[256];
static u32 at;
static void put(const char *s) { while (*s && at < sizeof line - 1) line[at++] = *s++; }
static void put_hex(u32 v)
{
    char s[9];
    for (int i = 0; i < 8; i++) s[i] = "0123456789abcdef"[v >> (28 - 4 * i) & 15];
    s[8] = 0;
    put(s);
}
static void put_dec(u32 v)
{
    char s[11];
    int n = 10;
    s[10] = 0;
    do { s[--n] = (char)('0' + v % 10); v /= 10; } while (v);
    put(s + n);
}
static void flush(void) { line[at++] = '\n'; sys(NR_write, 1, (long)line, at); at = 0; }
static void begin(const char *kind, const char *name) { put("ISOLATION "); put(kind); put(" "); put(name); }

static u32 good, bad, gaps;
static void ok(const char *name, u32 n) { good++; begin("ok", name); put(" "); put_dec(n); flush(); }
static void note(const char *name, const char *what) { begin("note", name); put(" "); put(what); flush(); }
static void failed(const char *name, u32 address, const char *what, u32 value)
{
    bad++;
    begin("FAIL", name); put(" "); put_hex(address); put(" "); put(what); put(" "); put_hex(value); flush();
}
static void must(const char *name, int holds, u32 value) { if (holds) ok(name, 1); else failed(name, 0, "got", value); }

/* ---- trying one instruction ---- */

/* Above the first 64 KiB and the same in all forms: what they may read and write. */
static u8 scratch[4096] __attribute__((aligned(4096), used));
static u8 tls[4096] __attribute__((aligned(4096), used));
static u8 signal_stack[32768];
static u32 saved_esp __asm__("saved_esp") __attribute__((used));
static u32 sel_flat __asm__("sel_flat") __attribute__((used)); /* of set_thread_area: base 0, 4 GiB */
static u32 sel_tls __asm__("sel_tls") __attribute__((used));   /* base TLS_BASE, 4 GiB */
static u32 tls_base __asm__("tls_base") __attribute__((used));

static volatile struct { u32 came, signal, code, address, eip, ecx, edi, trap, error, cr2; } caught;

/* attempt(form, target): a form begins with EDX = target, EBX, ESI and EDI = scratch, EAX, ECX and EBP 0. It ends with a
 * jump to `done`, with any stack pointer and any segments. There, or where a signal came, the handler takes over: the
 * kernel's return from it loads the ordinary segments. Yields EAX. */
u32 attempt(void (*form)(void), u32 target);
void done(void), finish(void), restorer(void);
__asm__(".text\n"
        "attempt: pushl %ebp; pushl %ebx; pushl %esi; pushl %edi; movl %esp, saved_esp\n"
        " movl 24(%esp), %edx; movl $scratch, %ebx; movl %ebx, %esi; movl %ebx, %edi\n"
        " xorl %eax, %eax; xorl %ecx, %ecx; xorl %ebp, %ebp; jmp *20(%esp)\n"
        "done: ud2\n"
        "finish: movl saved_esp, %esp\n"
        " cld; emms; fninit; popl %edi; popl %esi; popl %ebx; popl %ebp; ret\n"
        "restorer: movl $173, %eax; int $0x80\n");

enum { /* registers in the sigcontext, in words behind the 20 bytes of the ucontext's head */
    GS, FS, ES, DS, EDI, ESI, EBP, ESP, EBX, EDX, ECX, EAX, TRAP, ERROR, EIP, CS, EFLAGS, ESP2, SS, FPSTATE, MASK, CR2
};
static u32 straying; /* where this process, a child, has jumped to */
enum { AT_TARGET = 1, FURTHER, BACK };
static void on_signal(int number, u32 *info, u32 *context)
{
    u32 *r = context + 5;
    if (straying) sys(NR_exit, r[EIP] == straying ? AT_TARGET : FURTHER, 0, 0);
    r[EFLAGS] &= ~0x500u; /* DF, TF */
    r[CS] = 0x73; r[SS] = r[DS] = r[ES] = 0x7b; r[FS] = r[GS] = 0;
    r[ESP] = r[ESP2] = saved_esp;
    if (number == 4 && r[EIP] == (u32)done) { r[EIP] = (u32)finish; return; }
    caught.came++;
    caught.signal = (u32)number; caught.code = info[2]; caught.address = info[3];
    caught.eip = r[EIP]; caught.ecx = r[ECX]; caught.edi = r[EDI];
    caught.trap = r[TRAP]; caught.error = r[ERROR]; caught.cr2 = r[CR2];
    r[EIP] = (u32)finish;
}

enum {
    R = 0,          /* a #PF for a read */
    W = 1,          /* a #PF for a write */
    RW = 2,         /* a #PF, for either */
    FETCH = 3,      /* a #PF at the branch's target: EIP is there */
    GP = 4,         /* a #GP or the like: SI_KERNEL, no address */
    KIND = 7,
    FIXED = 8,      /* only at c0000000 */
    C = 16,         /* the same form must work at a user address; if it is no instruction there, it is not tried */
    WIDE = 32,      /* more than four bytes: moved down at the end of memory; 64-byte aligned */
    GAP = 64,       /* known to read under --isolation limits */
    ANY_EIP = 128,  /* EIP is not that of the form's last instruction */
    SELECTOR = 512, /* `mov r, sreg` has read a selector, which may be the host's number: what goes wrong is noted */
    ANY_GP = 256    /* #PF or #GP: the host's own selectors, which the guest's table does not have */
};

struct form { const char *name; void (*run)(void), (*instruction)(void); u32 flags, slack; };

/* Time for ticks and other processes between a segment's load and its use. DS may be null or any other by then. */
#define LATER "movl %ss:patience, %ecx; 1: decl %ecx; jnz 1b"
#define BOTH_WAYS(X, name, flags, setup, i) X(name, flags, 1, setup, i) X(name##_down, flags, 1, setup "; std", i)
#define STACK_AT(n) "leal " #n "(%edx), %esp"
#define FORMS(X) \
    X(load, R|C, 1, "", "movl (%edx), %eax") X(load8, R|C, 1, "", "movzbl (%edx), %eax") \
    X(load16, R|C, 1, "", "movzwl (%edx), %eax") X(test, R|C, 1, "", "testl %eax, (%edx)") \
    X(store, W|C, 1, "", "movl %eax, (%edx)") X(store8, W|C, 1, "", "movb %al, (%edx)") \
    X(store16, W|C, 1, "", "movw %ax, (%edx)") X(store_imm, W|C, 1, "", "movl $0, (%edx)") \
    X(or, RW|C, 1, "", "orl $0, (%edx)") X(lock_or, RW|C, 1, "", "lock orl $0, (%edx)") \
    X(xchg, RW|C, 1, "", "xchgl %eax, (%edx)") X(xadd, RW|C, 1, "", "xaddl %eax, (%edx)") \
    X(lock_xadd, RW|C, 1, "", "lock xaddl %eax, (%edx)") X(cmpxchg, RW|C, 1, "", "cmpxchgl %ecx, (%edx)") \
    X(lock_cmpxchg, RW|C, 1, "", "lock cmpxchgl %ecx, (%edx)") \
    X(cmpxchg8b, RW|C|WIDE, 8, "movl %edx, %esi; xorl %ebx, %ebx", "lock cmpxchg8b (%esi)") \
    X(inc, RW|C, 1, "", "incl (%edx)") X(not, RW|C, 1, "", "notl (%edx)") X(shl, RW|C, 1, "", "shll $1, (%edx)") \
    X(setcc, W|C, 1, "", "setz (%edx)") X(imul, R|C, 1, "", "imull (%edx), %eax") \
    X(idiv, R, 1, "movl %edx, %esi; cltd", "idivl (%esi)") \
    X(bt_up, R, 1, "leal -0x08000000(%edx), %edx; movl $0x40000000, %ecx", "btl %ecx, (%edx)") \
    X(bts_up, RW, 1, "leal -0x08000000(%edx), %edx; movl $0x40000000, %ecx", "btsl %ecx, (%edx)") \
    X(bts_down, RW, 1, "leal 0x08000000(%edx), %edx; movl $-0x40000000, %ecx", "btsl %ecx, (%edx)") \
    X(lock_btr, RW, 1, "leal -0x08000000(%edx), %edx; movl $0x40000000, %ecx", "lock btrl %ecx, (%edx)") \
    X(load_absolute, R|FIXED, 1, "", "movl 0xc0000000, %eax") X(store_absolute, W|FIXED, 1, "", "movl %eax, 0xc0000000") \
    X(load_scaled, R|C, 1, "leal -0x40000000(%edx), %esi; movl $0x08000000, %ecx", "movl (%esi,%ecx,8), %eax") \
    X(load_disp_up, R|C, 1, "leal -0x1000(%edx), %ecx", "movl 0x1000(%ecx), %eax") \
    X(load_disp_down, R|C, 1, "leal 0x1000(%edx), %ecx", "movl -0x1000(%ecx), %eax") \
    X(xlat, R|C, 1, "movl %edx, %ebx", "xlat") X(bound, R|WIDE, 8, "", "boundl %eax, (%edx)") \
    X(es_load, R|C, 1, "", "movl %es:(%edx), %eax") X(es_store, W|C, 1, "", "movl %eax, %es:(%edx)") \
    X(ss_load, R|C, 1, "", "movl %ss:(%edx), %eax") X(ss_store, W|C, 1, "", "movl %eax, %ss:(%edx)") \
    X(cs_load, R|C, 1, "", "movl %cs:(%edx), %eax") X(cs_store, GP, 1, "", "movl %eax, %cs:(%edx)") \
    X(ebp_load, R|C, 1, "movl %edx, %ebp", "movl 0(%ebp), %eax") X(ebp_store, W|C, 1, "movl %edx, %ebp", "movl %eax, 0(%ebp)") \
    X(ebp_ds_load, R|C, 1, "movl %edx, %ebp", "movl %ds:0(%ebp), %eax") \
    X(esp_load, R|C, 1, STACK_AT(0), "movl (%esp), %eax") X(esp_store, W|C, 1, STACK_AT(0), "movl %eax, (%esp)") \
    X(esp_scaled, R|C, 1, "leal -0x40000000(%edx), %esp; movl $0x08000000, %ecx", "movl (%esp,%ecx,8), %eax") \
    X(push, W|C, 1, STACK_AT(4), "pushl %eax") X(push16, W|C, 1, STACK_AT(2), "pushw %ax") \
    X(push_imm, W|C, 1, STACK_AT(4), "pushl $0x12345678") X(push_seg, W|C, 1, STACK_AT(4), "pushl %es") \
    X(push_mem, R|C, 1, "", "pushl (%edx)") X(pop_mem, W|C, 1, "pushl $0", "popl (%edx)") \
    X(push_mem_stack, W, 1, "movl %edx, %ecx; " STACK_AT(4), "pushl (%esi)") \
    X(pop, R|C, 1, STACK_AT(0), "popl %eax") X(pop16, R|C, 1, STACK_AT(0), "popw %ax") \
    X(pop_seg, R, 1, STACK_AT(0), "popl %es") X(pushf, W|C, 1, STACK_AT(4), "pushfl") X(popf, R, 1, STACK_AT(0), "popfl") \
    X(pusha, W|C|WIDE, 32, STACK_AT(32), "pushal") X(popa, R|C|WIDE, 32, STACK_AT(0), "popal") \
    X(call_stack, W, 1, STACK_AT(4), "call done") X(call_reg_stack, W, 1, "movl $done, %ecx; " STACK_AT(4), "call *%ecx") \
    X(lcall_stack, W|WIDE, 8, STACK_AT(8), "lcall $0x73, $done") \
    X(ret_stack, R, 1, STACK_AT(0), "ret") X(ret_n_stack, R, 1, STACK_AT(0), "ret $8") \
    X(lret_stack, R|WIDE, 8, STACK_AT(0), "lret") X(iret_stack, R|WIDE, 12, STACK_AT(0), "iret") \
    X(enter, W|C, 1, STACK_AT(4), "enter $0, $0") X(enter_nested, R, 1, "leal 4(%edx), %ebp", "enter $0, $2") \
    X(leave, R, 1, "movl %edx, %ebp", "leave") \
    X(call_mem, R, 1, "", "call *(%edx)") X(jmp_mem, R, 1, "", "jmp *(%edx)") X(lcall_mem, R|WIDE, 6, "", "lcall *(%edx)") \
    X(ljmp_mem, R|WIDE, 6, "", "ljmp *(%edx)") X(les, R|WIDE, 6, "", "lesl (%edx), %eax") \
    X(lds, R|WIDE, 6, "", "ldsl (%edx), %eax") X(lss, R|WIDE, 6, "", "lssl (%edx), %eax") \
    X(lfs, R|WIDE, 6, "", "lfsl (%edx), %eax") X(lgs, R|WIDE, 6, "", "lgsl (%edx), %eax") \
    X(mov_from_seg, W|C, 1, "", "movw %ds, (%edx)") X(mov_to_seg, R, 1, "", "movw (%edx), %es") \
    BOTH_WAYS(X, lods, R|C, "movl %edx, %esi", "lodsl") BOTH_WAYS(X, stos, W|C, "movl %edx, %edi", "stosl") \
    BOTH_WAYS(X, lodsb, R|C, "movl %edx, %esi", "lodsb") BOTH_WAYS(X, stosb, W|C, "movl %edx, %edi", "stosb") \
    BOTH_WAYS(X, scas, R|C, "movl %edx, %edi", "scasl") BOTH_WAYS(X, movs_from, R|C, "movl %edx, %esi", "movsl") \
    BOTH_WAYS(X, movs_to, W|C, "movl %edx, %edi", "movsl") BOTH_WAYS(X, cmps_esi, R|C, "movl %edx, %esi", "cmpsl") \
    BOTH_WAYS(X, cmps_edi, R|C, "movl %edx, %edi", "cmpsl") \
    BOTH_WAYS(X, es_lods, R|C, "movl %edx, %esi", "lodsl %es:(%esi)") \
    BOTH_WAYS(X, ss_movs, R|C, "movl %edx, %esi", "movsl %ss:(%esi), %es:(%edi)") \
    BOTH_WAYS(X, cs_movs, R|C, "movl %edx, %esi", "movsl %cs:(%esi), %es:(%edi)") \
    BOTH_WAYS(X, rep_stos, W|C, "movl %edx, %edi; movl $2, %ecx", "rep stosl") \
    BOTH_WAYS(X, rep_stosb, W|C, "movl %edx, %edi; movl $2, %ecx", "rep stosb") \
    BOTH_WAYS(X, rep_lods, R|C, "movl %edx, %esi; movl $2, %ecx", "rep lodsl") \
    BOTH_WAYS(X, rep_movs_from, R|C, "movl %edx, %esi; movl $2, %ecx", "rep movsl") \
    BOTH_WAYS(X, rep_movs_to, W|C, "movl %edx, %edi; movl $2, %ecx", "rep movsl") \
    BOTH_WAYS(X, rep_movsb_to, W|C, "movl %edx, %edi; movl $2, %ecx", "rep movsb") \
    BOTH_WAYS(X, repe_scas, R|C, "movl %edx, %edi; movl $2, %ecx", "repe scasl") \
    BOTH_WAYS(X, repne_scas, R|C, "movl %edx, %edi; movl $2, %ecx", "repne scasb") \
    BOTH_WAYS(X, repe_cmps, R|C, "movl %edx, %edi; movl $2, %ecx", "repe cmpsl") \
    X(ins, GP, 1, "movl %edx, %edi", "insb") X(outs, GP, 1, "movl %edx, %esi", "outsb") \
    X(fld, R|C|WIDE, 8, "", "fldl (%edx)") X(fst, W|C|WIDE, 8, "fld1", "fstl (%edx)") X(flds, R|C, 1, "", "flds (%edx)") \
    X(fsts, W|C, 1, "fld1", "fsts (%edx)") X(fild, R|C, 1, "", "fildl (%edx)") X(fistp, W|C, 1, "fld1", "fistpl (%edx)") \
    X(fldt, R|C|WIDE, 10, "", "fldt (%edx)") X(fstpt, W|C|WIDE, 10, "fld1", "fstpt (%edx)") \
    X(fadd, R|C, 1, "fld1", "fadds (%edx)") X(fnstcw, W|C, 1, "", "fnstcw (%edx)") X(fldcw, R|C, 1, "", "fldcw (%edx)") \
    X(fnstsw, W|C, 1, "", "fnstsw (%edx)") X(fnstenv, W|C|WIDE, 28, "", "fnstenv (%edx)") \
    X(fldenv, R|WIDE, 28, "", "fldenv (%edx)") X(fnsave, W|C|WIDE, 108, "", "fnsave (%edx)") \
    X(frstor, R|WIDE, 108, "", "frstor (%edx)") X(fxsave, W|C|WIDE, 512, "", "fxsave (%edx)") \
    X(fxrstor, R|WIDE, 512, "", "fxrstor (%edx)") X(stmxcsr, W|C, 1, "", "stmxcsr (%edx)") \
    X(ldmxcsr, R, 1, "", "ldmxcsr (%edx)") X(movups_load, R|C|WIDE, 16, "", "movups (%edx), %xmm0") \
    X(movups_store, W|C|WIDE, 16, "", "movups %xmm0, (%edx)") X(movaps_load, R|C|WIDE, 16, "", "movaps (%edx), %xmm0") \
    X(movaps_store, W|C|WIDE, 16, "", "movaps %xmm0, (%edx)") X(movss_load, R|C, 1, "", "movss (%edx), %xmm0") \
    X(movlps_store, W|C|WIDE, 8, "", "movlps %xmm0, (%edx)") X(movntps, W|C|WIDE, 16, "", "movntps %xmm0, (%edx)") \
    X(addps, R|C|WIDE, 16, "", "addps (%edx), %xmm0") X(movq_load, R|C|WIDE, 8, "", "movq (%edx), %mm0") \
    X(movq_store, W|C|WIDE, 8, "", "movq %mm0, (%edx)") X(paddb, R|C|WIDE, 8, "", "paddb (%edx), %mm0") \
    X(maskmovq, W|C|WIDE, 8, "movl %edx, %edi; pcmpeqb %mm0, %mm0", "maskmovq %mm0, %mm0") \
    X(movdqu_load, R|C|WIDE, 16, "", "movdqu (%edx), %xmm0") X(movdqu_store, W|C|WIDE, 16, "", "movdqu %xmm0, (%edx)") \
    X(movnti, W|C, 1, "", "movnti %eax, (%edx)") X(clflush, R|C, 1, "", "clflush (%edx)") \
    X(pshufb, R|C|WIDE, 16, "", "pshufb (%edx), %xmm0") X(crc32, R|C, 1, "", "crc32l (%edx), %eax") \
    X(popcnt, R|C, 1, "", "popcntl (%edx), %eax") X(movbe, R|C, 1, "", "movbe (%edx), %eax") \
    X(vmovups, R|C|WIDE, 32, "", "vmovups (%edx), %ymm0") X(bmi_andn, R|C, 1, "", "andn (%edx), %eax, %ecx") \
    X(sgdt, W|C|WIDE, 6, "", "sgdt (%edx)") X(sidt, W|C|WIDE, 6, "", "sidt (%edx)") X(sldt, W|C, 1, "", "sldt (%edx)") \
    X(str, W|C, 1, "", "str (%edx)") X(smsw, W|C, 1, "", "smsw (%edx)") X(lgdt, GP, 1, "", "lgdt (%edx)") \
    X(invlpg, GP, 1, "", "invlpg (%edx)") X(verr, R|C, 1, "", "verr (%edx)") X(verw, R|C, 1, "", "verw (%edx)") \
    X(lar, R|C, 1, "", "lar (%edx), %eax") X(lsl, R|C, 1, "", "lsl (%edx), %eax") X(arpl, RW|C, 1, "", "arpl %ax, (%edx)") \
    X(to_jmp, FETCH, 1, "", "jmp *%edx") X(to_call, FETCH, 1, "", "call *%edx") X(to_ret, FETCH, 1, "pushl %edx", "ret") \
    X(to_jmp_mem, FETCH, 1, "movl %edx, (%ebx)", "jmp *(%ebx)") X(to_call_mem, FETCH, 1, "movl %edx, (%ebx)", "call *(%ebx)") \
    X(to_lret, FETCH, 1, "pushl $0x73; pushl %edx", "lret") X(to_iret, FETCH, 1, "pushfl; pushl $0x73; pushl %edx", "iret") \
    X(to_ljmp_mem, FETCH, 1, "movl %edx, (%ebx); movl $0x73, 4(%ebx)", "ljmp *(%ebx)") \
    X(to_jmp_direct, FETCH|FIXED, 1, "", "jmp 0xc0000000") X(to_call_direct, FETCH|FIXED, 1, "", "call 0xc0000000") \
    X(to_jcc, FETCH|FIXED, 1, "cmpl %eax, %eax", "jz 0xc0000000") \
    X(to_ljmp_direct, FETCH|FIXED, 1, "", "ljmp $0x73, $0xc0000000") \
    X(to_lcall_direct, FETCH|FIXED, 1, "", "lcall $0x73, $0xc0000000") \
    X(fall_through, FETCH|FIXED, 1, "movb $0x90, 0xbfffffff; movl $0xbfffffff, %ecx", "jmp *%ecx") \
    X(straddle_load, R|FIXED, 1, "movl $0xbfffffff, %esi", "movl (%esi), %eax") \
    X(straddle_load16, R|FIXED, 1, "movl $0xbfffffff, %esi", "movw (%esi), %ax") \
    X(straddle_store, W|FIXED, 1, "movl $0xbffffffd, %esi", "movl %eax, (%esi)") \
    X(straddle_lock, RW|FIXED, 1, "movl $0xbffffffc, %esi; xorl %ebx, %ebx", "cmpxchg8b (%esi)") \
    X(straddle_push, W|FIXED, 1, "movl $0xc0000002, %esp", "pushl %eax") \
    X(straddle_pop, R|FIXED, 1, "movl $0xbffffffe, %esp", "popl %eax") \
    X(straddle_fxsave, W|FIXED, 512, "movl $0xbfffff00, %esi", "fxsave (%esi)") \
    X(straddle_movups, R|FIXED, 1, "movl $0xbffffff8, %esi", "movups (%esi), %xmm0") \
    X(straddle_movups_store, W|FIXED, 1, "movl $0xbffffff8, %esi", "movups %xmm0, (%esi)") \
    X(straddle_fstpt, W|FIXED, 1, "movl $0xbffffff8, %esi; fld1", "fstpt (%esi)") \
    X(fs_null, GP, 1, "movw %cx, %fs; " LATER, "movl %fs:(%edx), %eax") X(gs_null, GP, 1, "movw %cx, %gs; " LATER, "movl %gs:(%edx), %eax") \
    X(ds_null, GP, 1, "movw %cx, %ds; " LATER, "movl (%edx), %eax") X(es_null, GP, 1, "movw %cx, %es; " LATER, "movl %eax, %es:(%edx)") \
    X(ds_again, R|C|GAP, 1, "movl $0x7b, %ecx; movw %cx, %ds; " LATER, "movl (%edx), %eax") \
    X(gs_as_ds, R|C|GAP, 1, "movl $0x7b, %ecx; movw %cx, %gs; " LATER, "movl %gs:(%edx), %eax") \
    X(ss_again, W|C, 1, "movl $0x7b, %ecx; movw %cx, %ss", "movl %eax, %ss:(%edx)") \
    X(ds_as_cs, R|C, 1, "movl $0x73, %ecx; movw %cx, %ds; " LATER, "movl (%edx), %eax") \
    X(ds_to_es, W|C|SELECTOR, 1, "movl %ds, %ecx; movw %cx, %es; " LATER, "movl %eax, %es:(%edx)") \
    X(cs_to_fs, R|C|SELECTOR, 1, "movl %cs, %ecx; movw %cx, %fs; " LATER, "movl %fs:(%edx), %eax") \
    X(ss_to_gs, W|C|SELECTOR, 1, "movl %ss, %ecx; movw %cx, %gs; " LATER, "movl %eax, %gs:(%edx)") \
    X(tls_flat_ds, W|C, 1, "movl sel_flat, %ecx; movw %cx, %ds; " LATER, "movl %eax, (%edx)") \
    X(tls_flat_es, W|C, 1, "movl sel_flat, %ecx; movw %cx, %es; " LATER, "movl %eax, %es:(%edx)") \
    X(tls_flat_fs, R|C|GAP, 1, "movl sel_flat, %ecx; movw %cx, %fs; " LATER, "movl %fs:(%edx), %eax") \
    X(tls_flat_gs, R|C|GAP, 1, "movl sel_flat, %ecx; movw %cx, %gs; " LATER, "movl %gs:(%edx), %eax") \
    X(tls_flat_ss, W|C, 1, "movl sel_flat, %ecx; movw %cx, %ss", "movl %eax, %ss:(%edx)") \
    X(tls_based_gs, R|C|GAP, 1, "movl sel_tls, %ecx; movw %cx, %gs; " LATER "; subl tls_base, %edx", "movl %gs:(%edx), %eax") \
    X(tls_based_fs, R|C|GAP, 1, "movl sel_tls, %ecx; movw %cx, %fs; " LATER "; subl tls_base, %edx", "movl %fs:(%edx), %eax") \
    X(tls_based_ds, R|C|GAP, 1, "movl sel_tls, %ecx; subl tls_base, %edx; movw %cx, %ds; " LATER, "movl (%edx), %eax") \
    X(ldt_flat_ds, W|C, 1, "movl $7, %ecx; movw %cx, %ds; " LATER, "movl %eax, (%edx)") \
    X(ldt_flat_gs, R|C, 1, "movl $7, %ecx; movw %cx, %gs; " LATER, "movl %gs:(%edx), %eax") \
    X(ldt_flat_ss, W|C, 1, "movl $7, %ecx; movw %cx, %ss", "movl %eax, %ss:(%edx)") \
    X(ldt_expand_down, R|C, 1, "movl $15, %ecx; movw %cx, %fs; " LATER, "movl %fs:(%edx), %eax") \
    X(ldt_expand_down_ds, R|C, 1, "movl $15, %ecx; movw %cx, %ds; " LATER, "movl (%edx), %eax") \
    X(ldt_based_gs, R|C|GAP, 1, "movl $23, %ecx; movw %cx, %gs; " LATER, "movl %gs:-0x1000(%edx), %eax") \
    X(ldt_based_ss, W, 1, "movl $23, %ecx; movw %cx, %ss", "movl %eax, %ss:-0x1000(%edx)") \
    X(ldt_code, R, 1, "pushl $31; pushl $at_ldt_code; lret", "movl %cs:(%edx), %eax; ljmp $0x73, $done") \
    X(ldt_code_ds, R, 1, "pushl $31; pushl $at_ldt_code_ds; lret", "movl (%edx), %eax; ljmp $0x73, $done") \
    X(ldt_code_based, R|ANY_EIP, 1, "pushl $39; pushl $at_ldt_code_based - 0x1000; lret", \
      "movl %cs:-0x1000(%edx), %eax; ljmp $0x73, $done") \
    X(host_flat, GP|GAP|ANY_EIP|ANY_GP, 1, "movl $0x2b, %ecx; movw %cx, %ds; " LATER, "movl (%edx), %eax") \
    X(host_code, GP|GAP|ANY_EIP|ANY_GP, 1, "ljmp $0x23, $at_host_code", "movl %cs:(%edx), %eax; ljmp $0x73, $done")

#define CODE(name, flags, slack, setup, i) \
    void f_##name(void), at_##name(void); \
    __asm__(".text\nf_" #name ": " setup "\nat_" #name ": " i "\n jmp done\n");
#define ENTRY(name, flags, slack, setup, i) { #name, f_##name, at_##name, flags, slack },
FORMS(CODE)
static const struct form forms[] = { FORMS(ENTRY) };

static u32 targets[24] = { 0xc0000000, 0xc0000ffc, 0xc0100000, 0xc1000000, 0xc8000000, 0xcffffffc, 0xf8000000, 0xffffe000,
                           0xfffff000, 0xfffffffc };
static u32 target_count = 10;

u32 patience = 1;
enum { TWO_TICKS = 30000000 };

static u32 try_once(const struct form *f, u32 target)
{
    caught.came = 0;
    return attempt(f->run, target);
}

/* What is not as on bare metal; 0 if nothing. */
static const char *judged(const struct form *f, u32 target, u32 *value)
{
    u32 kind = f->flags & KIND;
    *value = caught.signal;
    if (caught.came != 1) return "several signals";
    if (caught.signal != 11) return "wrong signal";
    *value = caught.trap;
    if (f->flags & ANY_GP) return caught.trap == 13 || caught.trap == 14 ? 0 : "wrong vector";
    if (kind == GP) {
        if (caught.trap != 13 && caught.trap != 12) return "wrong vector";
        *value = caught.code;
        if (caught.code != SI_KERNEL) return "wrong si_code";
        *value = caught.address;
        if (caught.address) return "wrong si_addr";
    } else {
        if (caught.trap != 14) return "wrong vector";
        *value = caught.code;
        if (caught.code != SEGV_MAPERR && caught.code != SEGV_ACCERR) return "wrong si_code";
        *value = caught.address;
        if (caught.address - target >= f->slack) return "wrong si_addr";
        *value = caught.cr2;
        if (caught.cr2 != caught.address) return "wrong CR2";
        *value = caught.error;
        /* The kernel lets every address of its own half look like one that is mapped. */
        if ((caught.error & 5) != 5 || (kind != RW && (caught.error & 2) != (kind == W ? 2 : 0))) return "wrong error code";
    }
    *value = caught.eip;
    if (!(f->flags & ANY_EIP) && caught.eip != (kind == FETCH ? target : (u32)f->instruction)) return "wrong EIP";
    return 0;
}

static void run_form(const struct form *f)
{
    u32 n = 0, failures = 0, value = 0;
    if (f->flags & C) {
        for (u32 i = 0; i < sizeof scratch; i++) scratch[i] = 0;
        try_once(f, (u32)scratch + 1024);
        if (caught.came && caught.signal == 4) { note(f->name, "is no instruction here"); return; }
        if (caught.came && f->flags & SELECTOR) note(f->name, "the host's selector number, user memory");
        else if (caught.came) { failed(f->name, (u32)scratch + 1024, "does not work for user memory: vector", caught.trap); failures++; }
    }
    for (u32 i = 0; i < (f->flags & FIXED ? 1 : target_count); i++) {
        u32 target = targets[i];
        if (f->flags & WIDE) { target &= ~63u; if (target > 0xfffffe00) target = 0xfffffe00; }
        if (f->slack > 1 && target == 0xfffffe00 && f->slack < 512) target = 0xffffff00;
        for (u32 k = 0; k < sizeof scratch; k++) scratch[k] = 0;
        u32 got = try_once(f, target);
        if (!caught.came && f->flags & GAP) {
            gaps++;
            n++;
            begin("gap", f->name); put(" "); put_hex(target); put(" "); put_hex(got); flush();
            continue;
        }
        const char *what = caught.came ? judged(f, target, &value) : "NOT BLOCKED, read";
        if (!caught.came) value = got;
        if (what && caught.came && f->flags & SELECTOR) { note(f->name, "the host's selector number"); continue; }
        if (!what) n++;
        else if (!failures++) failed(f->name, target, what, value);
    }
    if (!failures) ok(f->name, n);
    else if (failures > 1) { put("ISOLATION failures of "); put(f->name); put(": "); put_dec(failures); flush(); }
}

/* ---- repetitions that run into the kernel's half ---- */

#define RUNS(X) \
    X(run_stosl, 0xbfffffe0, 64, 56, "rep stosl") X(run_stosb, 0xbffffffd, 64, 61, "rep stosb") \
    X(run_stosl_odd, 0xbffffffa, 64, 63, "rep stosl") X(run_stosw, 0xbffffff0, 64, 56, "rep stosw") \
    X(run_movsl_to, 0xbfffffc0, 100, 84, "rep movsl") X(run_movsb_to, 0xbffff800, 3000, 952, "rep movsb") \
    X(run_movsl_from, 0xbfffffe0, 64, 56, "xchgl %esi, %edi; rep movsl; xchgl %esi, %edi") \
    X(run_lodsl, 0xbfffffe0, 64, 56, "movl %edi, %esi; rep lodsl") X(run_scasl, 0xbfffffe0, 64, 56, "repne scasl") \
    X(run_cmpsl, 0xbfffffe0, 64, 56, "xchgl %esi, %edi; movl %esi, %edi; repe cmpsl")
#define RUN_CODE(name, start, count, left, i) \
    void f_##name(void); \
    __asm__(".text\nf_" #name ": movl $" #start ", %edi; movl $" #count ", %ecx; movl $0x5a5a5a5a, %eax; " i "\n jmp done\n");
#define RUN_ENTRY(name, start, count, left, i) { #name, f_##name, start, left },
RUNS(RUN_CODE)
static const struct { const char *name; void (*run)(void); u32 start, left; } runs[] = { RUNS(RUN_ENTRY) };

static void run_repetitions(void)
{
    for (u32 i = 0; i < sizeof runs / sizeof runs[0]; i++) {
        const char *name = runs[i].name;
        for (u32 k = 0; k < 4096; k++) *(volatile u8 *)(LAST_PAGE + k) = 0x11;
        caught.came = 0;
        u32 got = attempt(runs[i].run, KERNEL);
        if (!caught.came) failed(name, KERNEL, "NOT BLOCKED, read", got);
        else if (caught.signal != 11 || caught.trap != 14) failed(name, KERNEL, "wrong vector", caught.trap);
        else if (caught.address != KERNEL) failed(name, KERNEL, "wrong si_addr", caught.address);
        else if (caught.ecx != runs[i].left) failed(name, KERNEL, "wrong ECX", caught.ecx);
        else ok(name, 1);
    }
}

/* ---- the kernel's own checks of pointers ---- */

static void system_calls(void)
{
    long fd = sys(NR_open, (long)"/proc/self/exe", 0, 0), null = sys(NR_open, (long)"/dev/null", 1, 0);
    if (fd < 0 || null < 0) { failed("open", 0, "got", (u32)fd); return; }
    for (u32 i = 0; i < target_count; i++) {
        long t = (long)targets[i], r;
        if ((r = sys(NR_read, fd, t, 4)) != -EFAULT) failed("sys_read", (u32)t, "got", (u32)r);
        if ((r = sys(NR_write, null, t, 4)) != -EFAULT) failed("sys_write", (u32)t, "got", (u32)r);
        if ((r = sys(NR_getcwd, t, 64, 0)) != -EFAULT) failed("sys_getcwd", (u32)t, "got", (u32)r);
        if ((r = sys(NR_open, t, 0, 0)) != -EFAULT) failed("sys_open", (u32)t, "got", (u32)r);
    }
    long r = sys(NR_read, fd, KERNEL - 4, 8);
    must("sys_read_straddle", r == -EFAULT, (u32)r);
    r = sys(NR_getcwd, KERNEL - 1, 64, 0);
    must("sys_getcwd_straddle", r == -EFAULT, (u32)r);
    r = sys(NR_read, fd, KERNEL - 4, 4);
    must("sys_read_to_the_end", r == 4 && *(volatile u32 *)(KERNEL - 4) == 0x464c457f, (u32)r);
    ok("system_calls", 4 * target_count);
}

/* ---- jumps into the kernel's code ---- */

/* Functions that have run by then, so that a world shows them; how many bytes of each are tried as a target. */
static const struct { const char *name; u32 bytes; } strays[] = {
    { "entry_INT80_32", 256 }, { "asm_exc_page_fault", 16 }, { "schedule", 8 }, { "do_exit", 8 }, { "memset", 8 },
    { "_raw_spin_lock_irqsave", 32 }, { "_raw_spin_unlock_irqrestore", 32 }, { "native_flush_tlb_one_user", 8 },
    { "default_idle", 8 }, { "irqentry_exit", 8 }, { "sysvec_apic_timer_interrupt", 4 },
};
enum { STRAYS = sizeof strays / sizeof strays[0] };
static u32 stray_at[STRAYS];

static int same(const char *a, const char *b) { while (*a && *a == *b) a++, b++; return *a == *b; }

/* Fills stray_at from /proc/kallsyms: "ADDRESS TYPE NAME[\tMODULE]". */
static void find_strays(void)
{
    static char buffer[4096], symbol[256];
    long fd = sys(NR_open, (long)"/proc/kallsyms", 0, 0), got;
    u32 n = 0;
    while (fd >= 0 && (got = sys(NR_read, fd, (long)buffer, sizeof buffer)) > 0)
        for (long i = 0; i < got; i++) {
            if (buffer[i] != '\n') { if (n < sizeof symbol - 1) symbol[n++] = buffer[i]; continue; }
            symbol[n] = 0;
            u32 v = 0;
            for (u32 k = 0; k < 8; k++) v = v << 4 | (u32)(symbol[k] <= '9' ? symbol[k] - '0' : symbol[k] - 'a' + 10);
            for (u32 k = 0; k < STRAYS; k++) if (n > 11 && same(symbol + 11, strays[k].name)) stray_at[k] = v;
            n = 0;
        }
}

/* Ends with a signal at its target, or, where limits leave code segments whole, later; or comes back, or runs until it is
 * killed. The processes are children, whose stacks may be spoilt. Afterwards everything goes on. */
static void go_astray(void)
{
    find_strays();
    for (u32 i = 0; i < STRAYS; i++) {
        u32 failures = 0, further = 0, back = 0;
        if (!stray_at[i]) { note(strays[i].name, "is no symbol here"); continue; }
        for (u32 byte = 0; byte < strays[i].bytes; byte++) {
            u32 status = ~0u, target = stray_at[i] + byte;
            long child = sys(NR_fork, 0, 0, 0);
            if (!child) {
                straying = target;
                sys(NR_alarm, 1, 0, 0);
                ((void (*)(void))target)();
                for (;;) sys(NR_exit, BACK, 0, 0);
            }
            long r = child < 0 ? child : sys(NR_waitpid, child, (long)&status, 0);
            if (child < 0 || r != child) { if (!failures++) failed(strays[i].name, target, "wait", (u32)r); }
            else if (status == FURTHER << 8) further++;
            else if (status != AT_TARGET << 8) back++;
        }
        if (failures) continue;
        if (!further && !back) { ok(strays[i].name, strays[i].bytes); continue; }
        gaps++;
        begin("gap", "astray"); put(" "); put(strays[i].name); put(" "); put_dec(further); put(" "); put_dec(back); flush();
    }
    long nap[2] = { 0, 20000000 };
    long r = sys(NR_nanosleep, (long)nap, 0, 0);
    must("sleeps_after_all", !r, (u32)r);
}

/* ---- 64-bit mode ---- */

/* To the host's 64-bit code segment, which bare metal has not, and back. There the runtime of a world that holds the guest's
 * kernel, too, has all guest RAM (RAM_VA in host-driver-shim/src/raw/arena.rs). The code lies in a page of its own, which is
 * shown as it is because there is no system call in it. */
static __attribute__((used, aligned(4096))) u8 long_page[4096];
extern const u8 long_code[], long_end[];
__asm__(".text\nlong_code: .byte 0x48, 0xa1; .quad 0x200000000000\n" /* mov rax, [RAM_VA] */
        ".byte 0x48, 0xa3; .quad 0x200000000000\n"                    /* mov [RAM_VA], rax */
        ".byte 0xff, 0x2d; .long 0\n"                                 /* jmp far [rip] */
        ".long come_back; .word 0x23\n"
        "long_end: nop\n");

/* A child does, which ends by a signal, or comes back from it. */
static void long_mode(void)
{
    for (u32 i = 0; i < 3; i++) {
        u32 status = ~0u;
        long child = sys(NR_fork, 0, 0, 0);
        if (!child) {
            straying = 1;
            sys(NR_alarm, 1, 0, 0);
            memcpy(long_page, long_code, (u32)(long_end - long_code));
            long_page[64] = 0xc3;
            /* By a `ret` there the page is there to be executed; in 64-bit mode nobody would answer its fault. */
            __asm__ volatile("call long_page + 64; ljmp $0x33, $long_page\ncome_back:" : : : "eax", "memory");
            for (;;) sys(NR_exit, BACK, 0, 0);
        }
        long r = child < 0 ? child : sys(NR_waitpid, child, (long)&status, 0);
        if (child < 0 || r != child) { failed("long_mode", 0x33, "wait", (u32)r); return; }
        if (status == BACK << 8) { gaps++; begin("gap", "long_mode"); flush(); return; }
    }
    ok("long_mode", 3);
}

/* ---- what must work ---- */

#define WORKS(X) \
    X(last_word, 0x11223344, "movl $0x11223344, 0xbffffffc; movl 0xbffffffc, %eax") \
    X(last_word_es, 0x11223344, "movl $0xbffffffc, %edi; movl $0x11223344, %eax; stosl; xorl %eax, %eax; movl -4(%edi), %eax") \
    X(last_push, 0x55667788, "movl $0xc0000000, %esp; pushl $0x55667788; popl %eax") \
    X(last_call, 0x1234, "movl $0xc0000000, %esp; call 1f; jmp done; 1: movl $0x1234, %eax; ret") \
    X(last_rep, 0, "movl $0xbffff000, %edi; movl $1024, %ecx; rep stosl; movl %ecx, %eax") \
    X(wrapped_address, 0x99, "movl $0x99, (%ebx); movl $0xfffff000, %ecx; leal 0x1000(%ebx), %esi; movl (%esi,%ecx), %eax") \
    X(prefetch_kernel, 7, "prefetcht0 0xc0000000; prefetchnta 0xfffff000; movl $7, %eax") \
    X(lea_kernel, 0xc0000004, "leal 4(%edx), %eax") \
    X(nop_kernel, 8, "nopl (%edx); movl $8, %eax") \
    X(tls_negative, 0xabcd, "movl sel_tls, %ecx; movw %cx, %gs; " LATER "; movl tls_base, %esi; movl $0xabcd, -8(%esi); movl %gs:-8, %eax") \
    X(tls_negative_store, 0xef01, "movl sel_tls, %ecx; movw %cx, %gs; " LATER "; movl tls_base, %esi; movl $-64, %ecx;" \
      "movl $0xef01, %gs:(%ecx); movl -64(%esi), %eax") \
    X(tls_positive, 0x2345, "movl sel_tls, %ecx; movw %cx, %gs; " LATER "; movl tls_base, %esi; movl $0x2345, 16(%esi); movl %gs:16, %eax") \
    X(far_jmp, 5, "ljmp $0x73, $1f; 1: movl $5, %eax") \
    X(far_jmp_pointer, 6, "movl $1f, (%ebx); movl $0x73, 4(%ebx); ljmp *(%ebx); 1: movl $6, %eax") \
    X(far_call_ret, 9, "lcall $0x73, $1f; jmp done; 1: movl $9, %eax; lret") \
    X(iret_same, 10, "pushfl; pushl $0x73; pushl $1f; iret; 1: movl $10, %eax") \
    X(cs_read_data, 0x77, "movl $0x77, (%ebx); movl %cs:(%ebx), %eax")
#define WORK_CODE(name, value, i) void f_##name(void); __asm__(".text\nf_" #name ": " i "\n jmp done\n");
#define WORK_ENTRY(name, value, i) { #name, f_##name, value },
WORKS(WORK_CODE)
static const struct { const char *name; void (*run)(void); u32 value; } works[] = { WORKS(WORK_ENTRY) };

extern const u8 patched_call[];
__asm__(".text\ncall_it: int $0x80\n ret\n.set patched_call, call_it\n");

static void what_works(void)
{
    for (u32 i = 0; i < sizeof works / sizeof works[0]; i++) {
        caught.came = 0;
        u32 got = attempt(works[i].run, KERNEL);
        if (caught.came) failed(works[i].name, caught.cr2, "signal, vector", caught.trap);
        else must(works[i].name, got == works[i].value, got);
    }
    /* An `int 80h` that has been executed, read as data and through CS. */
    long pid;
    for (int i = 0; i < 3; i++) __asm__ volatile("call call_it" : "=a"(pid) : "0"(NR_getppid) : "memory");
    u32 data, code;
    __asm__ volatile("movzwl call_it, %0" : "=r"(data));
    __asm__ volatile("movzwl %%cs:call_it, %0" : "=r"(code));
    must("call_as_data", data == 0x80cd, data);
    if (code == 0x80cd) ok("call_through_cs", 1);
    else { begin("note", "call_through_cs"); put(" reads a patch: "); put_hex(code); flush(); }
}

/* ---- start ---- */

struct user_desc { u32 entry, base, limit, flags; };
enum { BITS32 = 1, DATA = 0 << 1, DOWN = 1 << 1, CODE_SEGMENT = 2 << 1, PAGES = 1 << 4, USABLE = 1 << 6 };

static u32 thread_area(u32 base)
{
    struct user_desc d = { (u32)-1, base, 0xfffff, BITS32 | PAGES | USABLE };
    long r = sys(NR_set_thread_area, (long)&d, 0, 0);
    if (r) failed("set_thread_area", base, "got", (u32)r);
    return d.entry << 3 | 3;
}
static void ldt(u32 entry, u32 base, u32 limit, u32 flags)
{
    struct user_desc d = { entry, base, limit, flags | BITS32 | PAGES | USABLE };
    long r = sys(NR_modify_ldt, 0x11, (long)&d, sizeof d);
    if (r) failed("modify_ldt", entry, "got", (u32)r);
}
static void on(int number)
{
    struct { void (*handler)(int, u32 *, u32 *); u32 flags; void (*restorer)(void); u32 mask[2]; } act =
        { on_signal, 0x4c000004 /* SA_SIGINFO, SA_RESTORER, SA_ONSTACK, SA_NODEFER */, restorer, { 0, 0 } };
    register long size __asm__("esi") = 8;
    long ret;
    __asm__ volatile("int $0x80" : "=a"(ret) : "a"(NR_rt_sigaction), "b"(number), "c"(&act), "d"(0), "S"(size) : "memory");
    if (ret) failed("sigaction", 0, "got", (u32)ret);
}
static long map_last_page(void) /* readable, writable and executable; it may be the stack's already */
{
    long ret;
    __asm__ volatile("pushl %%ebp; xorl %%ebp, %%ebp; int $0x80; popl %%ebp"
                     : "=a"(ret) : "a"(NR_mmap2), "b"(LAST_PAGE), "c"(4096), "d"(7), "S"(0x32), "D"(-1) : "memory");
    return ret;
}

static __attribute__((used)) void start_c(long *stack)
{
    char **argv = (char **)(stack + 1);
    for (long i = 1; i < stack[0] && target_count < 24; i++) {
        u32 v = 0;
        for (const char *s = argv[i]; *s; s++) v = v << 4 | (u32)(*s <= '9' ? *s - '0' : (*s | 32) - 'a' + 10);
        if (v >= KERNEL) targets[target_count++] = v & ~3u;
    }
    struct { void *sp; u32 flags, size; } alternative = { signal_stack, 0, sizeof signal_stack };
    sys(NR_sigaltstack, (long)&alternative, 0, 0);
    on(4); on(5); on(7); on(8); on(11);
    if (map_last_page() != (long)LAST_PAGE) failed("mmap", LAST_PAGE, "refused", 0);
    tls_base = (u32)tls + 2048;
    sel_flat = thread_area(0);
    sel_tls = thread_area(tls_base);
    ldt(0, 0, 0xfffff, DATA);
    ldt(1, 0, 0, DOWN);
    ldt(2, 0x1000, 0xfffff, DATA);
    ldt(3, 0, 0xfffff, CODE_SEGMENT);
    ldt(4, 0x1000, 0xfffff, CODE_SEGMENT);
    /* The guest's GDT and IDT: pages every system call touches, so that nothing but a limit or a right keeps them. */
    struct { unsigned short limit; u32 base; } __attribute__((packed)) table;
    __asm__ volatile("sgdt %0" : "=m"(table));
    if (table.base >= KERNEL) targets[target_count++] = table.base;
    __asm__ volatile("sidt %0" : "=m"(table));
    if (table.base >= KERNEL) targets[target_count++] = table.base;
    for (int i = 0; i < 1000; i++) sys(NR_getppid, 0, 0, 0);

    what_works();
    system_calls();
    run_repetitions();
    for (u32 i = 0; i < sizeof forms / sizeof forms[0]; i++) run_form(&forms[i]);
    u32 all = target_count;
    patience = TWO_TICKS;
    target_count = 1;
    what_works();
    for (u32 i = 0; i < sizeof forms / sizeof forms[0]; i++) run_form(&forms[i]);
    patience = 1;
    target_count = all;
    go_astray();
    long_mode();
    what_works(); /* still */
    put("ISOLATION-END "); put_dec(good); put(" "); put_dec(bad); put(" "); put_dec(gaps); flush();
    for (;;) sys(NR_exit, bad != 0, 0, 0);
}

__asm__(".text\n.globl _start\n_start:\n xorl %ebp, %ebp\n movl %esp, %eax\n andl $-16, %esp\n subl $12, %esp\n pushl %eax\n call start_c\n");
