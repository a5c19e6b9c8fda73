/* User-mode loops: integer, branches and calls, x87, SSE2, memory. Prints a result and the best time of each.
 *
 * No C library: the same static i386 binary runs on the host and in a guest with nothing but system calls by
 * int 80h (write, clock_gettime, exit). Results must be identical everywhere; times are compared by bench-compute.
 *
 * gcc -m32 -march=i686 -O2 -ffreestanding -nostdlib -static -fno-stack-protector -fno-pic -no-pie -fno-math-errno
 * Usage: compute [repetitions, default 5]
 */
typedef unsigned int u32;
typedef unsigned char u8;
typedef unsigned long long u64;
typedef double v2df __attribute__((vector_size(16)));

static long syscall3(long nr, long a, long b, long c)
{
    long ret;
    __asm__ volatile("int $0x80" : "=a"(ret) : "a"(nr), "b"(a), "c"(b), "d"(c) : "memory");
    return ret;
}

struct timespec32 { long sec, nsec; };

static u32 now_us(void) /* CLOCK_MONOTONIC, wraps after 71 minutes: only differences are used */
{
    struct timespec32 t;
    syscall3(265, 1, (long)&t, 0);
    return (u32)t.sec * 1000000u + (u32)t.nsec / 1000u;
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

static u32 mix(u32 h, u32 v) { return (h ^ v) * 16777619u; }

static u32 loop_integer(void)
{
    u32 x = 2463534242u, sum = 0;
    for (u32 i = 1; i < 60000000; i++) {
        x ^= x << 13; x ^= x >> 17; x ^= x << 5;
        sum = mix(sum, x + i * 3u);
        if ((i & 15) == 0) sum += x / (i | 1);
    }
    return sum;
}

static __attribute__((noinline)) u32 fib(u32 n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
static u32 loop_calls(void) { return fib(39); }

static u32 sieve_bits[32768];
static u32 loop_branches(void)
{
    u32 count = 0;
    for (u32 round = 0; round < 32; round++) {
        memset(sieve_bits, 0, sizeof sieve_bits);
        count = 0;
        for (u32 i = 2; i < 32768u * 32; i++) {
            if (sieve_bits[i >> 5] >> (i & 31) & 1) continue;
            count++;
            for (u32 j = i + i; j < 32768u * 32; j += i) sieve_bits[j >> 5] |= 1u << (j & 31);
        }
    }
    return count;
}

static u32 loop_x87(void)
{
    long double x = 1.0L, sum = 0.0L;
    for (u32 i = 1; i < 6000000; i++) {
        x = x * 1.0000001L + 1.0L / (long double)i;
        sum += __builtin_sqrtl(x);
        if (x > 1000.0L) x -= 999.0L;
    }
    union { long double d; u32 w[3]; } u = { sum };
    return mix(mix(mix(1, u.w[0]), u.w[1]), u.w[2] & 0xffff);
}

enum { N = 96 };
static double a[N][N] __attribute__((aligned(16))), b[N][N] __attribute__((aligned(16)));
static double c[N][N] __attribute__((aligned(16)));
static __attribute__((target("sse2"), noinline)) u32 loop_sse2(void)
{
    for (u32 i = 0; i < N; i++)
        for (u32 j = 0; j < N; j++) { a[i][j] = (int)(i * 7 + j) % 13; b[i][j] = (int)(i + j * 5) % 11; }
    for (u32 round = 0; round < 350; round++)
        for (u32 i = 0; i < N; i++)
            for (u32 j = 0; j < N; j += 4) {
                v2df s0 = { round, 0 }, s1 = { 0, 1 };
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

static u32 from[1 << 18], to[1 << 18]; /* 1 MiB each */
static u32 loop_memory(void)
{
    for (u32 i = 0; i < 1 << 18; i++) from[i] = i * 2654435761u;
    u32 h = 1;
    for (u32 round = 0; round < 600; round++) {
        const void *s = from; void *d = to; unsigned long n = 1 << 18;
        __asm__ volatile("rep movsl" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
        from[round * 97 & 0x3ffff] = mix(h, to[(round * 4099) & 0x3ffff]);
        for (u32 i = 0; i < 1 << 18; i += 16) h = mix(h, to[i]);
    }
    return h;
}

static char line[160];
static u32 put(u32 at, const char *s) { while (*s) line[at++] = *s++; return at; }
static u32 put_hex(u32 at, u32 v) { for (int i = 28; i >= 0; i -= 4) line[at++] = "0123456789abcdef"[v >> i & 15]; return at; }
static u32 put_dec(u32 at, u32 v)
{
    char digits[10]; int n = 0;
    do { digits[n++] = '0' + v % 10; v /= 10; } while (v);
    while (n) line[at++] = digits[--n];
    return at;
}

static void measure(const char *name, u32 (*loop)(void), u32 repetitions)
{
    u32 best = ~0u, result = 0, same = 1;
    for (u32 i = 0; i < repetitions; i++) {
        u32 start = now_us(), r = loop(), took = now_us() - start;
        if (took < best) best = took;
        if (i && r != result) same = 0;
        result = r;
    }
    u32 at = put(0, "COMPUTE ");
    at = put(at, name); at = put(at, " result="); at = put_hex(at, result);
    at = put(at, same ? " best_us=" : " UNSTABLE best_us="); at = put_dec(at, best);
    at = put(at, "\n");
    syscall3(4, 1, (long)line, at);
}

static __attribute__((used)) void start_c(long *stack)
{
    u32 repetitions = 0;
    if (stack[0] > 1)
        for (const char *s = (const char *)stack[2]; *s >= '0' && *s <= '9'; s++) repetitions = repetitions * 10 + (*s - '0');
    if (!repetitions) repetitions = 5;
    measure("integer", loop_integer, repetitions);
    measure("calls", loop_calls, repetitions);
    measure("branches", loop_branches, repetitions);
    measure("x87", loop_x87, repetitions);
    measure("sse2", loop_sse2, repetitions);
    measure("memory", loop_memory, repetitions);
    syscall3(4, 1, (long)"COMPUTE-END\n", 12);
    syscall3(1, 0, 0, 0);
}

__asm__(".globl _start\n_start:\n xorl %ebp, %ebp\n movl %esp, %eax\n andl $-16, %esp\n subl $12, %esp\n pushl %eax\n call start_c\n");
