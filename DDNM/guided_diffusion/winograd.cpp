// y = conv3x3(silu(scale x + shift)) + bias + skip with stride 1 and zero padding, on a CPU, by Winograd's F(4x4, 3x3):
// a tile of 4x4 results takes 36 multiplications for each pair of channels, not 144 (Lavin and Gray 2016, "Fast
// Algorithms for Convolutional Neural Networks", section 4). Tensors are float32, contiguous, channels last.
//
// A task takes some tiles through all three steps: transform the inputs (V = B^T d B), multiply by the transformed
// weights (M = V U), transform the results (A^T M A). V and M stay in the core's cache, so that memory sees little more
// than x and y once and U once a task.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 12;  // ROWS x 2 vectors of results fill the registers
#else
constexpr int64_t LANES = 8, ROWS = 6;
#endif
constexpr int64_t PANEL = 2 * LANES;      // output channels that are computed together
constexpr int64_t OUT = 4, IN = OUT + 2;  // a tile's results and inputs, a side
constexpr int64_t TILES = 24;             // of a task: more share a read of U, fewer leave V in the cache
constexpr int64_t CHUNK = 128;            // pixels that are summed in float32
static_assert(TILES % ROWS == 0);

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
#define INLINE __attribute__((always_inline)) inline

INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// x / (1 + exp(-x)), to a few units in the last place above -5 and to 1e-7 below, for |x| < 1e30
INLINE Vec silu(Vec x) {
  Vec t = x * -1.44269504f;  // exp(-x) = 2^t = 2^n 2^f
  t = t < -126.f ? Vec{} - 126.f : t;
  t = t > 126.f ? Vec{} + 126.f : t;
  const Vec n = (t + 12582912.f) - 12582912.f, f = t - n;  // + 1.5 * 2^23 rounds to a whole number
  const Vec power = 1.f + f * (0.693147181f + f * (0.240226507f + f * (0.0555041087f + f * (0.00961812911f +
                    f * (0.00133335581f + f * 0.000154035304f)))));  // Taylor's series of 2^f, |f| <= 1/2
  const IntVec bits = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x / (1.f + power * scale);
}

// B^T d, of six vectors that lie ``s`` apart
INLINE void transform_inputs(Vec* d, int64_t s) {
  const Vec d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s], d4 = d[4 * s], d5 = d[5 * s];
  const Vec a = d4 - 4 * d2, b = d3 - 4 * d1, c = d4 - d2, e = 2 * (d3 - d1);
  d[0] = 4 * d0 - 5 * d2 + d4;
  d[s] = a + b;
  d[2 * s] = a - b;
  d[3 * s] = c + e;
  d[4 * s] = c - e;
  d[5 * s] = 4 * d1 - 5 * d3 + d5;
}

// A^T m: six vectors become four
INLINE void transform_results(Vec* m, int64_t s) {
  const Vec a = m[s] + m[2 * s], b = m[s] - m[2 * s], c = m[3 * s] + m[4 * s], e = m[3 * s] - m[4 * s];
  m[0] = m[0] + a + c;
  m[s] = b + 2 * e;
  m[2 * s] = a + 4 * c;
  m[3 * s] = b + 8 * e + m[5 * s];
}

// m (ROWS, PANEL) = v (ROWS, C) u (C, PANEL); rows of v and m lie ``v_step`` and ``m_step`` apart
INLINE void multiply(const float* v, const float* u, float* m, int64_t C, int64_t v_step, int64_t m_step) {
  Vec sums[ROWS][2] = {};
  for (int64_t c = 0; c < C; c++) {
    __builtin_prefetch(u + (c + 16) * PANEL);
    __builtin_prefetch(u + (c + 16) * PANEL + LANES);
    const Vec left = load(u + c * PANEL), right = load(u + c * PANEL + LANES);
#pragma GCC unroll 12
    for (int64_t r = 0; r < ROWS; r++) {
      sums[r][0] += v[r * v_step + c] * left;
      sums[r][1] += v[r * v_step + c] * right;
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < ROWS; r++) {
    store(m + r * m_step, sums[r][0]);
    store(m + r * m_step + LANES, sums[r][1]);
  }
}

// Memory for results, taken back when they are freed: from the system, every page of a large block is cleared first.
class Pool {
 public:
  at::Tensor empty(at::IntArrayRef shape) {
    const auto bytes = c10::multiply_integers(shape) * sizeof(float);
    at::DataPtr block;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto found = free_.find(bytes);
      if (found != free_.end()) {
        block = std::move(found->second);
        free_.erase(found);
        held_ -= bytes;
      }
    }
    if (!block) block = at::getCPUAllocator()->allocate(bytes);
    void* start = block.get();
    auto owner = std::make_shared<at::DataPtr>(std::move(block));
    return at::from_blob(start, shape, [this, bytes, owner](void*) { keep(std::move(*owner), bytes); }, at::kFloat);
  }

 private:
  void keep(at::DataPtr block, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (held_ + bytes > MOST) return;
    held_ += bytes;
    free_.emplace(bytes, std::move(block));
  }

  static constexpr size_t MOST = size_t{1} << 30;  // bytes: the published U-Net's results for one image of 256x256
  std::mutex mutex_;
  std::unordered_multimap<size_t, at::DataPtr> free_;
  size_t held_ = 0;
};

Pool& pool() {
  static Pool* pool = new Pool;  // never destroyed: tensors may outlive every static object
  return *pool;
}

// x (B, H, W, C); affine (B, 2, C), scale and shift, or none: no SiLU either; u (36, O / PANEL, C, PANEL), the last
// panel filled up with zeros; bias (B, O); skip (B, H, W, O) or none; C and O are multiples of LANES. y (B, H, W, O).
at::Tensor convolve(const at::Tensor& x, const std::optional<at::Tensor>& affine, const at::Tensor& u,
                    const at::Tensor& bias, const std::optional<at::Tensor>& skip) {
  TORCH_CHECK(x.dim() == 4 && bias.dim() == 2, "convolve: expected x (B, H, W, C) and bias (B, O)");
  const int64_t B = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3), O = bias.size(1);
  const int64_t panels = (O + PANEL - 1) / PANEL;
  auto fits = [&](const at::Tensor& t, at::IntArrayRef shape) {
    TORCH_CHECK(t.is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous() && t.sizes() == shape,
                "convolve: expected a contiguous float32 tensor of shape ", shape, " on the CPU, got ", t.toString(),
                " ", t.sizes());
    return t.const_data_ptr<float>();
  };
  TORCH_CHECK(x.numel() > 0 && O > 0 && C % LANES == 0 && O % LANES == 0,
              "convolve: expected multiples of ", LANES, " channels, got x ", x.sizes(), " and ", O, " results");
  const float *xp = fits(x, {B, H, W, C}), *up = fits(u, {IN * IN, panels, C, PANEL}), *bp = fits(bias, {B, O});
  const float* ap = affine ? fits(*affine, {B, 2, C}) : nullptr;
  const float* sp = skip ? fits(*skip, {B, H, W, O}) : nullptr;
  auto y = pool().empty({B, H, W, O});
  float* yp = y.data_ptr<float>();

  const int64_t down = (H + OUT - 1) / OUT, across = (W + OUT - 1) / OUT, all = B * down * across;
  const int64_t blocks = (all + TILES - 1) / TILES;
  // where blocks of tiles are too few to keep every thread busy, a task takes some of the panels only
  const int64_t parts = std::clamp<int64_t>(4 * at::get_num_threads() / blocks, 1, panels);
  const int64_t v_step = IN * IN * C + LANES, m_step = IN * IN * PANEL + LANES;  // no power of two: cache sets

  at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = at::empty({TILES * (v_step + m_step)}, at::kFloat);
    float *v = scratch.data_ptr<float>(), *m = v + TILES * v_step;
    for (int64_t task = begin; task < end; task++) {
      const int64_t first = task / parts * TILES, tiles = std::min(TILES, all - first), part = task % parts;

      if (task == begin || part == 0)
        for (int64_t i = 0; i < tiles; i++) {
          const int64_t tile = first + i, b = tile / (down * across);
          const int64_t top = tile / across % down * OUT - 1, left = tile % across * OUT - 1;
          const float* corner = xp + ((b * H + top) * W + left) * C;
          const auto inside = [&](int64_t r, int64_t q) {
            return top + r >= 0 && top + r < H && left + q >= 0 && left + q < W;
          };
          const bool whole = inside(0, 0) && inside(IN - 1, IN - 1);
          for (int64_t c = 0; c < C; c += LANES) {
            if (whole)  // what the next tile adds
              for (int64_t r = 0; r < IN; r++)
                for (int64_t q = IN - OUT; q < IN; q++) __builtin_prefetch(corner + (r * W + q + OUT) * C + c);
            Vec d[IN * IN];
            for (int64_t r = 0; r < IN; r++)
              for (int64_t q = 0; q < IN; q++)
                d[r * IN + q] = whole || inside(r, q) ? load(corner + (r * W + q) * C + c) : Vec{};
            if (ap != nullptr) {
              const Vec scale = load(ap + 2 * b * C + c), shift = load(ap + (2 * b + 1) * C + c);
              for (int64_t r = 0; r < IN; r++)
                for (int64_t q = 0; q < IN; q++)  // padding is zero after the activation, not before
                  if (whole || inside(r, q)) d[r * IN + q] = silu(d[r * IN + q] * scale + shift);
            }
#pragma GCC unroll 6
            for (int64_t r = 0; r < IN; r++) transform_inputs(d + r * IN, 1);
#pragma GCC unroll 6
            for (int64_t q = 0; q < IN; q++) transform_inputs(d + q, IN);
            for (int64_t k = 0; k < IN * IN; k++) store(v + i * v_step + k * C + c, d[k]);
          }
        }

      for (int64_t panel = part * panels / parts; panel < (part + 1) * panels / parts; panel++) {
        for (int64_t k = 0; k < IN * IN; k++)
          for (int64_t i = 0; i < tiles; i += ROWS)  // past the last tile: computed, not used
            multiply(v + i * v_step + k * C, up + (k * panels + panel) * C * PANEL, m + i * m_step + k * PANEL, C,
                     v_step, m_step);
        for (int64_t i = 0; i < tiles; i++) {
          const int64_t tile = first + i, b = tile / (down * across);
          const int64_t top = tile / across % down * OUT, left = tile % across * OUT;
          for (int64_t half = 0; half < std::min(PANEL, O - panel * PANEL); half += LANES) {
            Vec d[IN * IN];
            for (int64_t k = 0; k < IN * IN; k++) d[k] = load(m + i * m_step + k * PANEL + half);
#pragma GCC unroll 6
            for (int64_t r = 0; r < IN; r++) transform_results(d + r * IN, 1);
#pragma GCC unroll 4
            for (int64_t q = 0; q < OUT; q++) transform_results(d + q, IN);
            const int64_t o = panel * PANEL + half;
            const Vec constant = load(bp + b * O + o);
            for (int64_t r = 0; r < std::min(OUT, H - top); r++)
              for (int64_t q = 0; q < std::min(OUT, W - left); q++) {
                const int64_t at = ((b * H + top + r) * W + left + q) * O + o;
                const Vec result = d[r * IN + q] + constant;
                store(yp + at, sp != nullptr ? result + load(sp + at) : result);
              }
          }
        }
      }
    }
  });
  return y;
}

// Sums of x - x[:, 0] and of its square over the pixels of x (B, N, C), a part of them each: (B, parts, 2, C).
// About a pixel of its own, a channel's variance does not cancel, unless that pixel is far from all others.
at::Tensor channel_sums(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 3 && x.is_cpu() && x.scalar_type() == at::kFloat && x.is_contiguous() &&
                  x.size(2) % LANES == 0,
              "channel_sums: expected a contiguous float32 tensor (B, N, C), C a multiple of ", LANES, ", on the CPU");
  const int64_t B = x.size(0), N = x.size(1), C = x.size(2), parts = (N + CHUNK - 1) / CHUNK;
  auto sums = at::empty({B, parts, 2, C}, x.options());
  const float* xp = x.const_data_ptr<float>();
  float* sp = sums.data_ptr<float>();
  at::parallel_for(0, B * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const float* image = xp + task / parts * N * C;
      const int64_t first = task % parts * CHUNK, last = std::min(first + CHUNK, N);
      for (int64_t c = 0; c < C; c += LANES) {
        const Vec origin = load(image + c);
        Vec sum = {}, square = {};
        for (int64_t n = first; n < last; n++) {
          const Vec d = load(image + n * C + c) - origin;
          sum += d;
          square += d * d;
        }
        store(sp + 2 * task * C + c, sum);
        store(sp + (2 * task + 1) * C + c, square);
      }
    }
  });
  return sums;
}

}  // namespace

TORCH_LIBRARY(spnn_winograd, library) {
  library.def("convolve(Tensor x, Tensor? affine, Tensor u, Tensor bias, Tensor? skip) -> Tensor", &convolve);
  library.def("channel_sums(Tensor x) -> Tensor", &channel_sums);
  library.def("empty(int[] shape) -> Tensor", [](at::IntArrayRef shape) { return pool().empty(shape); });
  library.def("lanes() -> int", []() { return LANES; });
}
