/* The rows of the benchmark: what the kernel does for a program, and what the program does alone.
 *
 * No C library: the same static i386 binary runs on the host and in guests. Each row is repeated for about 0.3 s, in
 * three batches, and prints the median of the three:
 *     ROW name ns_per_op ops
 * Time is CLOCK_MONOTONIC by int 80h, read outside the timed loop. What must be equal everywhere is printed as
 *     CHECK name hex
 * and what went wrong as `FAIL name what`. CLOCK lines let the one who watches compare clocks.
 *
 * gcc -m32 -march=i686 -O2 -ffreestanding -nostdlib -static -fno-stack-protector -fno-pic -no-pie
 * Usage: rows DIRECTORY-ON-TMPFS BUSYBOX [names that begin so]
 */
typedef unsigned int u32;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef double v2df __attribute__((vector_size(16)));

enum {
    NR_exit = 1, NR_fork = 2, NR_read = 3, NR_write = 4, NR_open = 5, NR_close = 6, NR_waitpid = 7, NR_unlink = 10,
    NR_execve = 11, NR_getpid = 20, NR_kill = 37, NR_pipe = 42, NR_dup2 = 63, NR_getppid = 64, NR_gettimeofday = 78,
    NR_munmap = 91, NR_mprotect = 125, NR_sigaction = 174, NR_mmap2 = 192, NR_stat64 = 195, NR_madvise = 219,
    NR_sched_setaffinity = 241, NR_sched_getaffinity = 242, NR_clock_gettime = 265
};

static long sys(long nr, long a, long b, long c)
{
    long ret;
    __asm__ volatile("int $0x80" : "=a"(ret) : "a"(nr), "b"(a), "c"(b), "d"(c) : "memory");
    return ret;
}

static long anonymous(long size) /* mmap2(0, size, READ | WRITE, PRIVATE | ANONYMOUS, -1, 0) */
{
    long ret;
    __asm__ volatile("pushl %%ebp; xorl %%ebp, %%ebp; int $0x80; popl %%ebp"
                     : "=a"(ret) : "a"(NR_mmap2), "b"(0), "c"(size), "d"(3), "S"(0x22), "D"(-1) : "memory");
    return ret;
}

struct timespec32 { long sec, nsec; };

static u64 now(void)
{
    struct timespec32 t;
    sys(NR_clock_gettime, 1, (long)&t, 0);
    return (u64)(u32)t.sec * 1000000000u + (u32)t.nsec;
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

static u64 divide(u64 n, u32 by) /* libgcc is not linked */
{
    u32 high = (u32)(n >> 32), low = (u32)n, q1 = high / by, rest = high % by, q0;
    __asm__("divl %4" : "=a"(q0), "=d"(rest) : "a"(low), "d"(rest), "r"(by));
    return (u64)q1 << 32 | q0;
}

/* ---- what is printed ---- */

static char line[200];
static u32 at;
static void put(const char *s) { while (*s && at < sizeof line) line[at++] = *s++; }
static void put_dec(u64 v)
{
    char digits[21];
    int n = 20;
    digits[20] = 0;
    do { u64 q = divide(v, 10); digits[--n] = (char)('0' + (u32)(v - q * 10)); v = q; } while (v);
    put(digits + n);
}
static void put_hex(u32 v)
{
    char s[9];
    for (int i = 0; i < 8; i++) s[i] = "0123456789abcdef"[v >> (28 - 4 * i) & 15];
    s[8] = 0;
    put(s);
}
static void flush(void) { put("\n"); sys(NR_write, 1, (long)line, at); at = 0; }

static const char *row_name;
static u32 failed; /* the row's first failure has been said */
static void fail(const char *what)
{
    if (failed) return;
    failed = 1;
    put("FAIL "); put(row_name); put(" "); put(what); flush();
}
static void check_line(const char *name, u32 value) { put("CHECK "); put(name); put(" "); put_hex(value); flush(); }
static void clock_line(void) { put("CLOCK "); put_dec(now()); flush(); }

/* ---- what the rows use ---- */

static const char *own_path, *directory, *busybox;
static char file_path[160], data_path[160];
static u32 vsyscall;             /* __kernel_vsyscall, by AT_SYSINFO */
static int (*vdso_gettimeofday)(void *, void *);
static int zero_fd, null_fd;
static u8 buffer[4096], *pages;
static u32 mix(u32 h, u32 v) { return (h ^ v) * 16777619u; }

static long fork(void) { return sys(NR_fork, 0, 0, 0); }
static void quit(int code) { for (;;) sys(NR_exit, code, 0, 0); }
static void reap(long pid, u32 expected)
{
    u32 status = 0xdead;
    if (pid < 0) { fail("fork"); return; }
    if (sys(NR_waitpid, pid, (long)&status, 0) != pid) fail("waitpid");
    else if (status != expected << 8) fail("a child's exit code");
}

/* ---- system calls ---- */

static void null_int80(u32 n) { for (long p = sys(NR_getppid, 0, 0, 0); n--;) if (sys(NR_getppid, 0, 0, 0) != p) fail("getppid"); }
static void null_vdso(u32 n)
{
    long first = sys(NR_getppid, 0, 0, 0);
    while (n--) {
        long ret;
        __asm__ volatile("call *%1" : "=a"(ret) : "m"(vsyscall), "0"(NR_getppid) : "memory");
        if (ret != first) fail("getppid");
    }
}
static void read_zero(u32 n)
{
    while (n--) if (sys(NR_read, zero_fd, (long)buffer, 512) != 512) fail("read");
    for (u32 i = 0; i < 512; i++) if (buffer[i]) fail("zeros");
}
static void write_null(u32 n) { while (n--) if (sys(NR_write, null_fd, (long)buffer, 512) != 512) fail("write"); }
static void stat_path(u32 n) { u8 st[128]; while (n--) if (sys(NR_stat64, (long)directory, (long)st, 0)) fail("stat"); }
static void time_int80(u32 n) { long tv[2]; while (n--) if (sys(NR_gettimeofday, (long)tv, 0, 0)) fail("gettimeofday"); }
static void time_vdso(u32 n) { long tv[2]; while (n--) if (vdso_gettimeofday(tv, 0)) fail("gettimeofday"); }
static void proc_read(u32 n)
{
    while (n--) {
        long fd = sys(NR_open, (long)"/proc/self/stat", 0, 0);
        if (fd < 0) { fail("open"); return; }
        if (sys(NR_read, fd, (long)buffer, sizeof buffer) < 20) fail("read");
        sys(NR_close, fd, 0, 0);
    }
}
static void tmpfs(u32 n)
{
    while (n--) {
        long fd = sys(NR_open, (long)file_path, 0x242 /* O_RDWR | O_CREAT | O_TRUNC */, 0600);
        if (fd < 0) { fail("open"); return; }
        if (sys(NR_write, fd, (long)buffer, sizeof buffer) != sizeof buffer) fail("write");
        sys(NR_close, fd, 0, 0);
        if (sys(NR_unlink, (long)file_path, 0, 0)) fail("unlink");
    }
}

/* ---- memory ---- */

enum { PAGE = 4096, AREA = 4 << 20 };
static void make_area(void)
{
    long area = anonymous(AREA);
    if ((u32)area > 0xfffff000u) fail("mmap");
    pages = (u8 *)area;
    sys(NR_madvise, area, AREA, 15 /* MADV_NOHUGEPAGE; a kernel may not know it */);
}
static void fill_area(void) { make_area(); for (u32 i = 0; i < AREA; i += 4) *(u32 *)(pages + i) = i; }
static void drop_area(void) { sys(NR_munmap, (long)pages, AREA, 0); }
static void page_fault(u32 n) /* includes a 1,024th of the madvise that makes the pages go away */
{
    for (u32 i = 0; n--; i = (i + PAGE) % AREA) {
        if (!i && sys(NR_madvise, (long)pages, AREA, 4 /* MADV_DONTNEED */)) fail("madvise");
        *(volatile u32 *)(pages + i) = 1; /* a store first: a load would map the shared page of zeros */
        if (*(volatile u32 *)(pages + i + 4)) fail("a new page is not zero");
    }
}
static void mmap_touch(u32 n) /* four pages */
{
    while (n--) {
        long p = anonymous(4 * PAGE);
        if ((u32)p > 0xfffff000u) { fail("mmap"); return; }
        for (u32 i = 0; i < 4; i++) *(volatile u32 *)(p + (long)i * PAGE) = 1;
        if (*(volatile u32 *)(p + 4)) fail("a new page is not zero");
        if (sys(NR_munmap, p, 4 * PAGE, 0)) fail("munmap");
    }
}
static void protect(u32 n) /* to read-only and back, with a store */
{
    while (n--) {
        if (sys(NR_mprotect, (long)pages, PAGE, 1)) fail("mprotect");
        if (sys(NR_mprotect, (long)pages, PAGE, 3)) fail("mprotect");
        ++*(volatile u32 *)pages;
    }
}

/* ---- processes ---- */

static void fork_exit(u32 n)
{
    while (n--) {
        long pid = fork();
        if (!pid) quit(3);
        reap(pid, 3);
    }
}
static void execute(const char *path, const char *const *argv, u32 expected, int out)
{
    static const char *const environment[] = { "PATH=/bin", 0 };
    long pid = fork();
    if (!pid) {
        if (out >= 0) sys(NR_dup2, out, 1, 0);
        sys(NR_execve, (long)path, (long)argv, (long)environment);
        quit(127);
    }
    reap(pid, expected);
}
static void fork_exec(u32 n) { const char *argv[] = { own_path, 0 }; while (n--) execute(own_path, argv, 5, -1); }
static void fork_cow(u32 n) /* the child writes to each of 1,024 pages */
{
    while (n--) {
        long pid = fork();
        if (!pid) {
            for (u32 i = 0; i < AREA; i += PAGE) (*(volatile u32 *)(pages + i))++;
            for (u32 i = 0; i < AREA; i += PAGE) if (*(u32 *)(pages + i) != i + 1) quit(1);
            quit(4);
        }
        reap(pid, 4);
    }
    for (u32 i = 0; i < AREA; i += PAGE) if (*(u32 *)(pages + i) != i) fail("a child's store reached its parent");
}

/* A ring of processes with a pipe before each; this one is number 0. Closing what it writes to ends them all. */
static int ring_pipes[500][2];
static long ring_pids[500];
static u32 ring_size;
static void ring(u32 size)
{
    ring_size = size;
    for (u32 i = 0; i < size; i++) if (sys(NR_pipe, (long)ring_pipes[i], 0, 0)) fail("pipe");
    for (u32 i = 1; i < size; i++) {
        if ((ring_pids[i] = fork())) continue;
        int in = ring_pipes[i][0], out = ring_pipes[(i + 1) % size][1];
        for (u32 k = 0; k < size; k++) {
            if (ring_pipes[k][0] != in) sys(NR_close, ring_pipes[k][0], 0, 0);
            if (ring_pipes[k][1] != out) sys(NR_close, ring_pipes[k][1], 0, 0);
        }
        u32 token;
        while (sys(NR_read, in, (long)&token, 4) == 4) { token++; sys(NR_write, out, (long)&token, 4); }
        quit(6);
    }
}
static void ring2(void) { ring(2); }
static void ring8(void) { ring(8); }
static void ring16(void) { ring(16); }
static void ring64(void) { ring(64); }
static void ring200(void) { ring(200); }
static void ring500(void) { ring(500); }
static void round_trip(u32 n)
{
    u32 token = 0, expected = 0;
    while (n--) {
        sys(NR_write, ring_pipes[1][1], (long)&token, 4);
        if (sys(NR_read, ring_pipes[0][0], (long)&token, 4) != 4) { fail("read"); return; }
        if (token != (expected += ring_size - 1)) fail("the token came back wrong");
    }
}
static void end_ring(void)
{
    for (u32 i = 0; i < ring_size; i++) { sys(NR_close, ring_pipes[i][0], 0, 0); sys(NR_close, ring_pipes[i][1], 0, 0); }
    for (u32 i = 1; i < ring_size; i++) reap(ring_pids[i], 6);
}

/* ---- signals ---- */

struct action { void (*handler)(void); u32 flags; void (*restorer)(void); u32 mask[2]; };
static volatile u32 signals;
void restorer(void), count_signal(void), skip_access(void);
static u32 counted __asm__("counted") __attribute__((used));
__asm__("restorer: popl %eax; movl $119, %eax; int $0x80\n"
        "count_signal: incl counted; ret\n"
        /* sigcontext.ip, above return address and signal number: past the two bytes of `mov (%ecx), %eax` */
        "skip_access: incl counted; addl $2, 64(%esp); ret\n");
static void on(int signal, void (*handler)(void))
{
    struct action act = { handler, 0x04000000 /* SA_RESTORER */, restorer, { 0, 0 } };
    register long size __asm__("esi") = 8;
    long ret;
    __asm__ volatile("int $0x80" : "=a"(ret) : "a"(NR_sigaction), "b"(signal), "c"(&act), "d"(0), "S"(size) : "memory");
    if (ret) fail("sigaction");
}
static void on_usr1(void) { on(10, count_signal); }
static void signal_self(u32 n)
{
    long me = sys(NR_getpid, 0, 0, 0);
    u32 expected = counted + n;
    while (n--) sys(NR_kill, me, 10, 0);
    if (*(volatile u32 *)&counted != expected) fail("signals were lost");
}
static void on_segv(void) { make_area(); sys(NR_mprotect, (long)pages, PAGE, 0); on(11, skip_access); }
static void end_segv(void) { on(11, 0); drop_area(); }
static void segv(u32 n)
{
    u32 expected = counted + n;
    while (n--) { u32 value; __asm__ volatile("movl (%%ecx), %%eax" : "=a"(value) : "c"(pages) : "memory"); }
    if (*(volatile u32 *)&counted != expected) fail("faults were lost");
}

/* ---- the program alone ---- */

static volatile u32 sink;
static u32 integer_loop(u32 n) /* 1,000 steps an operation */
{
    u32 x = 2463534242u, sum = 0;
    while (n--)
        for (u32 i = 1; i <= 1000; i++) {
            x ^= x << 13; x ^= x >> 17; x ^= x << 5;
            sum = mix(sum, x + i * 3u);
            if ((i & 15) == 0) sum += x / (i | 1);
        }
    return sum;
}
static void integer(u32 n) { sink = integer_loop(n); }
static __attribute__((noinline, noclone)) u32 fib(u32 n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
static void calls(u32 n) { while (n--) if (fib(16) != 987) fail("fib"); } /* 3,193 calls an operation */
static u32 x87_loop(u32 n) /* 100 steps an operation */
{
    long double x = 1.0L, sum = 0.0L;
    while (n--)
        for (u32 i = 1; i <= 100; i++) {
            long double root = x;
            x = x * 1.0000001L + 1.0L / (long double)i;
            __asm__("fsqrt" : "+t"(root));
            sum += root;
            if (x > 1000.0L) x -= 999.0L;
        }
    union { long double d; u32 w[3]; } u = { sum };
    return mix(mix(mix(1, u.w[0]), u.w[1]), u.w[2] & 0xffff);
}
static void x87(u32 n) { sink = x87_loop(n); }
enum { N = 32 };
static double a[N][N] __attribute__((aligned(16))), b[N][N] __attribute__((aligned(16)));
static double c[N][N] __attribute__((aligned(16)));
static __attribute__((target("sse2"), noinline)) u32 sse2_loop(u32 n) /* a product of two 32 by 32 matrices */
{
    for (u32 i = 0; i < N; i++)
        for (u32 j = 0; j < N; j++) { a[i][j] = (int)(i * 7 + j) % 13; b[i][j] = (int)(i + j * 5) % 11; }
    while (n--)
        for (u32 i = 0; i < N; i++)
            for (u32 j = 0; j < N; j += 4) {
                v2df s0 = { n & 255, 0 }, s1 = { 0, 1 };
                for (u32 k = 0; k < N; k++) {
                    v2df f = { a[i][k], a[i][k] };
                    s0 += f * *(v2df *)&b[k][j];
                    s1 += f * *(v2df *)&b[k][j + 2];
                }
                *(v2df *)&c[i][j] = s0;
                *(v2df *)&c[i][j + 2] = s1;
            }
    u32 h = 1, *w = (u32 *)c;
    for (u32 i = 0; i < sizeof c / 4; i++) h = mix(h, w[i]);
    return h;
}
static void sse2(u32 n) { sink = sse2_loop(n); }
static u32 from[1 << 18], to[1 << 18]; /* 1 MiB each */
static void copy(u32 n) /* 1 MiB an operation */
{
    while (n--) {
        const void *s = from; void *d = to; unsigned long count = 1 << 18;
        __asm__ volatile("rep movsl" : "+D"(d), "+S"(s), "+c"(count) : : "memory");
    }
    if (to[12345] != from[12345]) fail("the copy differs");
}
/* A cycle through all 65,536 cache lines of 4 MiB, in an order no prefetcher knows (Sattolo's shuffle). */
static void make_chain(void)
{
    u32 x = 88172645u;
    make_area();
    for (u32 i = 0; i < 65536; i++) *(u32 *)(pages + i * 64) = i;
    for (u32 i = 65535; i > 0; i--) {
        x ^= x << 13; x ^= x >> 17; x ^= x << 5;
        u32 *p = (u32 *)(pages + i * 64), *q = (u32 *)(pages + x % i * 64), t = *p;
        *p = *q; *q = t;
    }
}
static u32 walk(u32 steps) { u32 i = 0; while (steps--) i = *(volatile u32 *)(pages + i * 64); return i; }
static void chase(u32 n) { while (n--) sink = walk(1000); } /* 1,000 loads an operation */

/* FIPS 180-4. */
static u32 sha_state[8], sha_k[64];
static u32 ror(u32 v, int n) { return v >> n | v << (32 - n); }
static void sha_block(const u8 *p)
{
    u32 w[64], s[8];
    for (int i = 0; i < 16; i++) w[i] = (u32)p[4 * i] << 24 | (u32)p[4 * i + 1] << 16 | (u32)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        u32 s0 = ror(w[i - 15], 7) ^ ror(w[i - 15], 18) ^ w[i - 15] >> 3;
        u32 s1 = ror(w[i - 2], 17) ^ ror(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    for (int i = 0; i < 8; i++) s[i] = sha_state[i];
    for (int i = 0; i < 64; i++) {
        u32 t1 = s[7] + (ror(s[4], 6) ^ ror(s[4], 11) ^ ror(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + sha_k[i] + w[i];
        u32 t2 = (ror(s[0], 2) ^ ror(s[0], 13) ^ ror(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        s[7] = s[6]; s[6] = s[5]; s[5] = s[4]; s[4] = s[3] + t1; s[3] = s[2]; s[2] = s[1]; s[1] = s[0]; s[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) sha_state[i] += s[i];
}
/* First 32 fraction bits of the square and cube roots of the first primes, found by integer search. */
static u32 root_fraction(u32 prime, int cube)
{
    u32 whole = 0, fraction = 0;
    while (cube ? (whole + 1) * (whole + 1) * (whole + 1) <= prime : (whole + 1) * (whole + 1) <= prime) whole++;
    for (int bit = 31; bit >= 0; bit--) {
        /* r = whole.fraction (at most 5 + 32 bits); compare r*r or r*r*r with prime, as words of 32 bits */
        u32 r[2] = { fraction | 1u << bit, whole }, product[6] = { 0 }, power[6] = { r[0], r[1] }, over = 0;
        for (int k = 0; k < (cube ? 2 : 1); k++) {
            for (int i = 0; i < 6; i++) product[i] = 0;
            for (int i = 0; i < 4; i++)
                for (int j = 0, carry = 0; j < 2 || (carry && i + j < 6); j++) {
                    u64 sum = (u64)product[i + j] + (u32)carry + (j < 2 ? (u64)power[i] * r[j] : 0);
                    product[i + j] = (u32)sum;
                    carry = (int)(sum >> 32);
                }
            for (int i = 0; i < 6; i++) power[i] = product[i];
        }
        over = power[cube ? 3 : 2];
        if (over < prime) fraction |= 1u << bit;
    }
    return fraction;
}
static void sha_start(void)
{
    u32 found = 0;
    for (u32 p = 2; found < 64; p++) {
        u32 composite = 0;
        for (u32 d = 2; d * d <= p; d++) if (p % d == 0) composite = 1;
        if (composite) continue;
        if (found < 8) sha_state[found] = root_fraction(p, 0);
        sha_k[found++] = root_fraction(p, 1);
    }
}
static void sha256(u32 n) { while (n--) for (u32 i = 0; i < 16384; i += 64) sha_block((u8 *)from + i); } /* 16 KiB */

/* ---- by busybox ---- */

static void shell_loop(u32 n) /* a shell that runs ten programs */
{
    const char *argv[] = { "busybox", "sh", "-c",
        "i=0; while [ $i -lt 10 ]; do i=$((i+1)); \"$0\" true || exit 9; done; exit 8", busybox, 0 };
    while (n--) execute(busybox, argv, 8, null_fd);
}
static void make_data(void) /* 512 KiB that can be compressed by about half */
{
    long fd = sys(NR_open, (long)data_path, 0x241, 0600);
    u32 x = 1;
    if (fd < 0) { fail("open"); return; }
    for (u32 k = 0; k < 128; k++) {
        for (u32 i = 0; i < sizeof buffer; i++) { x = x * 1103515245u + 12345u; buffer[i] = "etaoin shrdlucmf"[x >> 28]; }
        if (sys(NR_write, fd, (long)buffer, sizeof buffer) != sizeof buffer) fail("write");
    }
    sys(NR_close, fd, 0, 0);
}
static void drop_data(void) { sys(NR_unlink, (long)data_path, 0, 0); }
static void gzip(u32 n)
{
    const char *argv[] = { "busybox", "gzip", "-c", data_path, 0 };
    while (n--) execute(busybox, argv, 0, null_fd);
}

/* ---- measuring ---- */

static const struct row { const char *name; void (*setup)(void), (*run)(u32), (*end)(void); } rows[] = {
    { "null_int80", 0, null_int80, 0 }, { "null_vdso", 0, null_vdso, 0 },
    { "read_zero", 0, read_zero, 0 }, { "write_null", 0, write_null, 0 }, { "stat", 0, stat_path, 0 },
    { "gettimeofday_int80", 0, time_int80, 0 }, { "gettimeofday_vdso", 0, time_vdso, 0 },
    { "page_fault", make_area, page_fault, drop_area }, { "mmap_touch_munmap", 0, mmap_touch, 0 },
    { "mprotect", fill_area, protect, drop_area },
    { "fork_exit", 0, fork_exit, 0 }, { "fork_exec", 0, fork_exec, 0 }, { "fork_cow_4mb", fill_area, fork_cow, drop_area },
    { "pipe_round_trip", ring2, round_trip, end_ring }, { "switch_8", ring8, round_trip, end_ring },
    { "switch_16", ring16, round_trip, end_ring },
    { "signal", on_usr1, signal_self, 0 }, { "sigsegv", on_segv, segv, end_segv },
    { "tmpfs", 0, tmpfs, 0 }, { "proc_read", 0, proc_read, 0 },
    { "integer", 0, integer, 0 }, { "calls", 0, calls, 0 }, { "x87", 0, x87, 0 }, { "sse2", 0, sse2, 0 },
    { "memcpy_1mb", 0, copy, 0 }, { "sha256_16kb", 0, sha256, 0 }, { "pointer_chase", make_chain, chase, drop_area },
    { "shell_loop", 0, shell_loop, 0 }, { "gzip_512kb", make_data, gzip, drop_data },
    /* How it grows: only where asked for. */
    { "grow_64", ring64, round_trip, end_ring }, { "grow_200", ring200, round_trip, end_ring },
    { "grow_500", ring500, round_trip, end_ring },
};

static u64 timed(const struct row *row, u32 n) { u64 start = now(); row->run(n); return now() - start; }

static void measure(const struct row *row)
{
    enum { BATCH = 100000000, ENOUGH = 20000000 };
    u64 ns[3], took = ENOUGH;
    u32 n = 1;
    failed = 0;
    row_name = row->name;
    if ((row->run == null_vdso && !vsyscall) || (row->run == time_vdso && !vdso_gettimeofday)) { fail("not in the vDSO"); return; }
    if (row->setup) row->setup();
    row->run(1); /* what comes once in a process's life is nobody's steady state: code translated, worlds made */
    while (!failed && (took = timed(row, n)) < ENOUGH && n < 1u << 30) n *= took < ENOUGH / 8 ? 4 : 2;
    if (took < BATCH) { u64 more = divide((u64)BATCH * 1024, (u32)took); n = (u32)(((u64)n * more) >> 10); }
    for (int i = 0; i < 3 && !failed; i++) ns[i] = timed(row, n);
    if (row->end) row->end();
    if (failed) return;
    u64 low = ns[0] < ns[1] ? ns[0] : ns[1], high = ns[0] < ns[1] ? ns[1] : ns[0];
    u64 median = ns[2] < low ? low : ns[2] > high ? high : ns[2];
    u64 milli = divide(median * 1000, n);
    u32 part = (u32)(milli - divide(milli, 1000) * 1000);
    put("ROW "); put(row->name); put(" "); put_dec(divide(milli, 1000)); put(part < 10 ? ".00" : part < 100 ? ".0" : ".");
    put_dec(part); put(" "); put_dec(n); flush();
}

static void checks(void)
{
    static const u8 abc[64] = { 'a', 'b', 'c', 0x80, [63] = 24 };
    check_line("integer", integer_loop(100));
    check_line("x87", x87_loop(100));
    check_line("sse2", sse2_loop(300));
    sha_start();
    sha_block(abc);
    check_line("sha256_abc", sha_state[0]); /* ba7816bf by the standard */
    for (u32 i = 0; i < 1 << 18; i++) from[i] = i * 2654435761u;
    sha256(64);
    check_line("sha256", sha_state[7]);
    make_chain();
    check_line("pointer_chase", walk(100000));
    drop_area();
}

/* ---- start ---- */

struct dynamic { u32 tag, value; };
struct symbol { u32 name, value, size; u8 info, other; u16 section; };
static int same(const char *x, const char *y) { while (*x && *x == *y) x++, y++; return *x == *y; }
static int begins(const char *x, const char *start) { while (*start && *x == *start) x++, start++; return !*start; }
static void *vdso_symbol(u32 base, const char *name)
{
    u32 headers = base + *(u32 *)(base + 28), count = *(u16 *)(base + 44), load = 0, found = 0;
    struct dynamic *d = 0;
    for (u32 i = 0; i < count; i++) {
        u32 *h = (u32 *)(headers + i * 32); /* type, offset, vaddr, ... */
        if (h[0] == 1 && !found) { load = base + h[1] - h[2]; found = 1; }
        if (h[0] == 2) d = (struct dynamic *)(base + h[1]);
    }
    u32 strings = 0, symbols = 0;
    for (; d && d->tag; d++) { if (d->tag == 5) strings = load + d->value; if (d->tag == 6) symbols = load + d->value; }
    /* The symbol table ends where the strings begin: there may be no DT_HASH that counts it. */
    for (struct symbol *s = (struct symbol *)symbols; symbols && (u32)(s + 1) <= strings; s++)
        if (s->value && same((char *)strings + s->name, name)) return (void *)(load + s->value);
    return 0;
}

static void join(char *path, const char *dir, const char *name)
{
    u32 n = 0;
    while (*dir && n < 100) path[n++] = *dir++;
    while (*name && n < 158) path[n++] = *name++;
}

static void one_cpu(void) /* as the guests have: the lowest this process may use */
{
    u32 mask[32] = { 0 }, i = 0;
    if (sys(NR_sched_getaffinity, 0, sizeof mask, (long)mask) <= 0) return;
    while (i < 31 && !mask[i]) i++;
    mask[i] &= -mask[i];
    while (++i < 32) mask[i] = 0;
    sys(NR_sched_setaffinity, 0, sizeof mask, (long)mask);
}

static __attribute__((used)) void start_c(long *stack)
{
    long argc = stack[0];
    const char **argv = (const char **)(stack + 1);
    if (argc == 1) quit(5); /* executed by the row fork_exec */
    if (argc < 3) { put("usage: rows DIRECTORY BUSYBOX [PREFIX]"); flush(); quit(2); }
    own_path = argv[0]; directory = argv[1]; busybox = argv[2];
    long *aux = stack + argc + 2;
    while (*aux++) {}
    for (; aux[0]; aux += 2) {
        if (aux[0] == 32) vsyscall = (u32)aux[1];
        if (aux[0] == 33) vdso_gettimeofday = (int (*)(void *, void *))vdso_symbol((u32)aux[1], "__vdso_gettimeofday");
    }
    join(file_path, directory, "/rows-file");
    join(data_path, directory, "/rows-data");
    zero_fd = (int)sys(NR_open, (long)"/dev/zero", 0, 0);
    null_fd = (int)sys(NR_open, (long)"/dev/null", 1, 0);
    one_cpu();
    clock_line();
    row_name = "checks";
    checks();
    for (u32 i = 0; i < sizeof rows / sizeof rows[0]; i++)
        if (argc < 4 ? !begins(rows[i].name, "grow_") : begins(rows[i].name, argv[3])) measure(&rows[i]);
    clock_line();
    put("ROWS-END"); flush();
    quit(0);
}

__asm__(".globl _start\n_start:\n xorl %ebp, %ebp\n movl %esp, %eax\n andl $-16, %esp\n subl $12, %esp\n pushl %eax\n call start_c\n");
