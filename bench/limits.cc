// What this machine can do at most, one JSON line a test: {"name", "kind", "unit", "median", "min", "max"}.
// kind: fp32, bf16, int8 (multiply and add counted as two operations) or read (DRAM).
// Usage: limits THREADS BUFFER_BYTES [read]; "read": that kind alone. Compiled for the baseline; each test has its own target and runs if
// the CPU has it.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

// Runs `work(thread)` on all threads at once and returns the seconds from the first start to the last end.
double timed(int threads, const std::function<void(int)>& work) {
  std::vector<Clock::time_point> starts(threads), ends(threads);
  std::atomic<int> waiting{threads};
  std::vector<std::thread> crew;
  for (int t = 0; t < threads; ++t)
    crew.emplace_back([&, t] {
      for (--waiting; waiting.load();) std::this_thread::yield();
      starts[t] = Clock::now();
      work(t);
      ends[t] = Clock::now();
    });
  for (auto& thread : crew) thread.join();
  const auto first = *std::min_element(starts.begin(), starts.end());
  return std::chrono::duration<double>(*std::max_element(ends.begin(), ends.end()) - first).count();
}

void report(const char* name, const char* kind, const char* unit, int threads, double amount, const std::function<void(int)>& work) {
  constexpr int kRuns = 9;
  timed(threads, work);  // pages, frequency
  std::vector<double> rates;
  for (int run = 0; run < kRuns; ++run) rates.push_back(amount / timed(threads, work) / 1e9);
  std::sort(rates.begin(), rates.end());
  std::printf("{\"name\":\"%s\",\"kind\":\"%s\",\"unit\":\"%s\",\"median\":%.3f,\"min\":%.3f,\"max\":%.3f}\n", name, kind, unit,
              rates[kRuns / 2], rates.front(), rates.back());
  std::fflush(stdout);
}

// A compute test: `ops` operations an iteration, on registers only.
void compute(const char* name, const char* kind, int threads, double ops, void (*loop)(long)) {
  long iterations = 1000;
  while (timed(1, [&](int) { loop(iterations); }) < 4e-3) iterations *= 2;
  iterations *= 5;  // about 20 to 40 ms
  report(name, kind, "Gop/s", threads, ops * iterations * threads, [&](int) { loop(iterations); });
}

// Twelve independent accumulators cover latency times throughput of every FMA unit so far. STEP(acc) is one step.
#define ACCUMULATE(Vec, STEP)                                                                                     \
  Vec c0{}, c1{}, c2{}, c3{}, c4{}, c5{}, c6{}, c7{}, c8{}, c9{}, c10{}, c11{};                                   \
  for (long i = 0; i < n; ++i) {                                                                                  \
    STEP(c0) STEP(c1) STEP(c2) STEP(c3) STEP(c4) STEP(c5) STEP(c6) STEP(c7) STEP(c8) STEP(c9) STEP(c10) STEP(c11) \
  }                                                                                                               \
  asm volatile("" ::"x"(c0), "x"(c1), "x"(c2), "x"(c3), "x"(c4), "x"(c5), "x"(c6), "x"(c7), "x"(c8), "x"(c9), "x"(c10), "x"(c11));

#if defined(__x86_64__)
typedef float F4 __attribute__((vector_size(16)));
typedef float F8 __attribute__((vector_size(32)));
typedef float F16 __attribute__((vector_size(64)));
typedef int I8 __attribute__((vector_size(32)));
typedef int I16 __attribute__((vector_size(64)));

void fp32_sse2(long n) {
  F4 a{1, 1, 1, 1};
  asm("" : "+x"(a));
#define STEP(c)                                                               \
  {                                                                           \
    F4 p = a;                                                                 \
    asm volatile("mulps %2, %1\n\taddps %1, %0" : "+x"(c), "+x"(p) : "x"(a)); \
  }
  ACCUMULATE(F4, STEP)
#undef STEP
}

__attribute__((target("avx2,fma"))) void fp32_avx2(long n) {
  F8 a{};
  a += 1;
#define STEP(c) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(c) : "x"(a));
  ACCUMULATE(F8, STEP)
#undef STEP
}

__attribute__((target("avx512f"))) void fp32_avx512(long n) {
  F16 a{};
  a += 1;
#define STEP(c) asm volatile("vfmadd231ps %1, %1, %0" : "+v"(c) : "v"(a));
  ACCUMULATE(F16, STEP)
#undef STEP
}

__attribute__((target("avx512f,avx512bf16"))) void bf16_avx512(long n) {
  F16 a{};
#define STEP(c) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(c) : "v"(a));
  ACCUMULATE(F16, STEP)
#undef STEP
}

// 32 (or 64) int8 products an accumulator: multiply to pairs of int16, pairs to int32, add.
__attribute__((target("avx2"))) void int8_avx2_maddubs(long n) {
  I8 a{}, ones{};
  a += 0x01010101, ones += 0x00010001;
#define STEP(c)                                                                                                                \
  {                                                                                                                            \
    I8 p;                                                                                                                      \
    asm volatile("vpmaddubsw %2, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0" : "+x"(c), "=&x"(p) : "x"(a), "x"(ones)); \
  }
  ACCUMULATE(I8, STEP)
#undef STEP
}

// The same products on int16: exact for all values, and without the step from int16 pairs to int32.
__attribute__((target("avx2"))) void int8_avx2_madd(long n) {
  I8 a{};
  a += 0x00010001;
#define STEP(c)                                                                            \
  {                                                                                        \
    I8 p;                                                                                  \
    asm volatile("vpmaddwd %2, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(c), "=&x"(p) : "x"(a)); \
  }
  ACCUMULATE(I8, STEP)
#undef STEP
}

__attribute__((target("avx512bw"))) void int8_avx512_maddubs(long n) {
  I16 a{}, ones{};
  a += 0x01010101, ones += 0x00010001;
#define STEP(c)                                                                                                                \
  {                                                                                                                            \
    I16 p;                                                                                                                     \
    asm volatile("vpmaddubsw %2, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0" : "+v"(c), "=&v"(p) : "v"(a), "v"(ones)); \
  }
  ACCUMULATE(I16, STEP)
#undef STEP
}

__attribute__((target("avx2"))) void int8_avxvnni(long n) {
  I8 a{};
#define STEP(c) asm volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(c) : "x"(a));
  ACCUMULATE(I8, STEP)
#undef STEP
}

__attribute__((target("avx512f,avx512vnni"))) void int8_avx512vnni(long n) {
  I16 a{};
#define STEP(c) asm volatile("vpdpbusd %1, %1, %0" : "+v"(c) : "v"(a));
  ACCUMULATE(I16, STEP)
#undef STEP
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    std::fill_n(row_bytes, 8, uint16_t{64});
    std::fill_n(rows, 8, uint8_t{16});
  }
};

// Four independent products; the tiles hold zeros, which does not change the timing.
#define TILES(op)                                                                                                                      \
  const TileConfig config;                                                                                                             \
  asm volatile(                                                                                                                        \
      "ldtilecfg %0\n\ttilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\t"                                   \
      "tilezero %%tmm4\n\ttilezero %%tmm5\n\ttilezero %%tmm6\n\ttilezero %%tmm7" ::"m"(config));                                       \
  for (long i = 0; i < n; ++i)                                                                                                         \
    asm volatile(op " %tmm6, %tmm4, %tmm0\n\t" op " %tmm7, %tmm4, %tmm1\n\t" op " %tmm6, %tmm5, %tmm2\n\t" op " %tmm7, %tmm5, %tmm3"); \
  asm volatile("tilerelease");

void bf16_amx(long n) {
  TILES("tdpbf16ps")
}
void int8_amx(long n) {
  TILES("tdpbssd")
}

struct Registers {
  unsigned a, b, c, d;
};
Registers cpuid(unsigned leaf, unsigned sub) {
  Registers r;
  asm volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(sub));
  return r;
}

// Linux hands the tile registers out on request, and only where the hypervisor passes them on.
bool amx_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

void compute_tests(int threads) {
  __builtin_cpu_init();
  compute("sse2", "fp32", threads, 12 * 4 * 2, fp32_sse2);
  const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2 && __builtin_cpu_supports("fma")) compute("avx2 fma", "fp32", threads, 12 * 8 * 2, fp32_avx2);
  if (avx2) compute("avx2 maddubs", "int8", threads, 12 * 32 * 2, int8_avx2_maddubs);
  if (avx2) compute("avx2 madd", "int8", threads, 12 * 16 * 2, int8_avx2_madd);
  if (avx2 && cpuid(7, 0).a >= 1 && cpuid(7, 1).a >> 4 & 1) compute("avx-vnni", "int8", threads, 12 * 32 * 2, int8_avxvnni);
  if (__builtin_cpu_supports("avx512f")) compute("avx512 fma", "fp32", threads, 12 * 16 * 2, fp32_avx512);
  if (__builtin_cpu_supports("avx512bf16")) compute("avx512 bf16", "bf16", threads, 12 * 32 * 2, bf16_avx512);
  if (__builtin_cpu_supports("avx512bw")) compute("avx512 maddubs", "int8", threads, 12 * 64 * 2, int8_avx512_maddubs);
  if (__builtin_cpu_supports("avx512vnni")) compute("avx512 vnni", "int8", threads, 12 * 64 * 2, int8_avx512vnni);
  const unsigned features = cpuid(7, 0).d;
  if (!(features >> 24 & 1) || !amx_granted()) return;
  if (features >> 22 & 1) compute("amx bf16", "bf16", threads, 4 * 16 * 16 * 32 * 2, bf16_amx);
  if (features >> 25 & 1) compute("amx int8", "int8", threads, 4 * 16 * 16 * 64 * 2, int8_amx);
}
#else
void compute_tests(int) {}
#endif

// DRAM: each thread reads its own part in order; the loads are cheap, the prefetch hides the latency.
typedef uint64_t Words __attribute__((vector_size(16)));

void read_range(const char* begin, const char* end, ptrdiff_t ahead) {
  Words sum[4] = {};
  for (const char* p = begin; p < end; p += 64) {
    __builtin_prefetch(p + ahead);
    const Words* line = reinterpret_cast<const Words*>(p);
    for (int i = 0; i < 4; ++i) sum[i] ^= line[i];
  }
  sum[0] ^= sum[1] ^ sum[2] ^ sum[3];
  volatile uint64_t keep = sum[0][0] ^ sum[0][1];
  (void)keep;
}

bool read_tests(int threads, size_t bytes) {
  const size_t part = bytes / threads / 4096 * 4096;
  void* memory = mmap(nullptr, part * threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return false;
  madvise(memory, part * threads, MADV_HUGEPAGE);
  char* data = static_cast<char*>(memory);
  timed(threads, [&](int t) { std::memset(data + t * part, t + 1, part); });
  for (int ahead : {0, 1024, 2048, 4096}) {
    char name[64];
    std::snprintf(name, sizeof name, "read, prefetch %d B ahead", ahead);
    report(name, "read", "GB/s", threads, double(part) * threads,
           [&](int t) { read_range(data + t * part, data + (t + 1) * part, ahead); });
  }
  munmap(memory, part * threads);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const size_t bytes = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  if (threads < 1 || bytes < size_t(threads) * 4096) {
    std::fprintf(stderr, "usage: limits THREADS BUFFER_BYTES [read] (at least a page a thread)\n");
    return 2;
  }
  if (argc <= 3) compute_tests(threads);
  return read_tests(threads, bytes) ? 0 : 1;
}
