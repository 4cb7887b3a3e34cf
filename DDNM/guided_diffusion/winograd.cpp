// y = conv(silu(scale x + shift)) + bias + skip, 3x3 or 1x1, padded with zeros, on a CPU. x may be enlarged to twice
// its size first, and be several tensors that stand for their concatenation: neither is written to memory. Tensors are
// float32, contiguous, channels last.
//
// With stride 1, 3x3 goes by Winograd's F(4x4, 3x3): a tile of 4x4 results takes 36 multiplications for each pair of
// channels, not 144 (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4). A task takes
// some tiles through all three steps: transform the inputs (V = B^T d B), multiply by the transformed weights
// (M = V U), transform the results (A^T M A). V and M stay in the core's cache, so that memory sees little more than x
// and y once and U once a task.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 12;  // ROWS x 2 vectors of results fill the registers
#else
constexpr int64_t LANES = 8, ROWS = 6;
#endif
constexpr int64_t PANEL = 2 * LANES;      // output channels that are computed together
constexpr int64_t CHUNK = 128;            // pixels that `moments` sums in float32

// How a tile of OUT x OUT results comes from IN x IN inputs. A task takes TILES of them: more share a read of the
// weights, fewer leave V in the core's cache.
struct Winograd {
  static constexpr int64_t OUT = 4, IN = 6, TILES = 24;
};
// A row of V, the pixel's K x K neighbours, times the weights as they are: for maps so small that reading the weights,
// of which Winograd's way has four times as many, is what takes the time.
template <int64_t K>
struct Direct {
  static constexpr int64_t OUT = 1, IN = K, TILES = 72;
};
static_assert(Winograd::TILES % ROWS == 0 && Direct<3>::TILES % ROWS == 0);

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
#define INLINE __attribute__((always_inline)) inline

INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// ``stream`` stores past the caches, whose lines need not be read first then; ``streamed`` ends a thread's streaming.
// ``reciprocal`` is 1 / x to a unit in the last place where that is normal and 0 beyond: an estimate and a step of
// Newton's, in a third of a division's time.
#if defined(__AVX512F__)
INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, (__m512)v); }
INLINE Vec estimate(Vec x) { return (Vec)_mm512_maskz_rcp14_ps(-1, (__m512)x); }
#elif defined(__AVX2__)
INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, (__m256)v); }
INLINE Vec estimate(Vec x) { return (Vec)_mm256_rcp_ps((__m256)x); }
#endif
#ifdef __AVX2__
INLINE void streamed() { _mm_sfence(); }
INLINE Vec reciprocal(Vec x) {
  const Vec r = estimate(x);
  return r * (2.f - x * r);
}
#else
INLINE void stream(float* p, Vec v) { store(p, v); }
INLINE void streamed() {}
INLINE Vec reciprocal(Vec x) { return 1.f / x; }
#endif

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
  return x * reciprocal(1.f + power * scale);
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

// Memory for results and scratch, taken back when they are freed: from the system, every page of a large block is cleared
// first.
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

// Sums of channels' values over some pixels, about the first of them: there a variance does not cancel, unless that
// pixel is far from all others.
struct Sums {
  Vec origin, sum = {}, square = {};
  float count = 0;

  INLINE void write(float* to, int64_t O) const {  // to (SUMS, O)
    store(to, origin);
    store(to + O, sum);
    store(to + 2 * O, square);
    store(to + 3 * O, Vec{} + count);
  }
};
constexpr int64_t SUMS = 4;

// What `Sums` wrote to ``from`` .. ``to``, (SUMS, O) each, together: means and means of squares, moments (2, O).
void reduce(const float* from, const float* to, int64_t O, double* moments) {
  for (int64_t o = 0; o < O; o++) {
    double sum = 0, square = 0, count = 0;
    for (const float* p = from + o; p < to; p += SUMS * O) {
      const double origin = p[0], s = p[O], n = p[3 * O];
      sum += s + n * origin;
      square += p[2 * O] + origin * (2 * s + n * origin);
      count += n;
    }
    moments[o] = sum / count;
    moments[O + o] = square / count;
  }
}

// x (B, h, w, C_p), the parts of C channels; scale_factor 1, or 2, which makes 2x2 of a pixel; stride 1 or 2;
// affine (B, 2, C), scale and shift, or none: no SiLU either; u (36, O / PANEL, C, PANEL) for Winograd and
// (1, O / PANEL, K K C, PANEL) for Direct<K>, the last panel filled up with zeros; bias (B, O); skip (B, H, W, O) or
// none; C_p and O are multiples of LANES. Returns y (B, H, W, O) and its moments, (B, 2, O) in float64.
template <typename Method>
std::tuple<at::Tensor, at::Tensor> convolve_by(at::TensorList x, const std::optional<at::Tensor>& affine,
                                               const at::Tensor& u, const at::Tensor& bias,
                                               const std::optional<at::Tensor>& skip, int64_t scale_factor,
                                               int64_t stride) {
  constexpr int64_t OUT = Method::OUT, IN = Method::IN, TILES = Method::TILES;
  constexpr bool is_winograd = OUT > 1;
  constexpr int64_t padding = (IN - OUT) / 2;
  const int64_t B = x[0].size(0), h = x[0].size(1), w = x[0].size(2), O = bias.size(1);
  // of the enlarged map, and of y
  const int64_t large_h = scale_factor * h, large_w = scale_factor * w, halvings = scale_factor - 1;
  const int64_t H = (large_h - 1) / stride + 1, W = (large_w - 1) / stride + 1;
  const int64_t panels = (O + PANEL - 1) / PANEL;
  auto fits = [&](const at::Tensor& t, at::IntArrayRef shape) {
    TORCH_CHECK(t.is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous() && t.sizes() == shape,
                "convolve: expected a contiguous float32 tensor of shape ", shape, " on the CPU, got ", t.toString(),
                " ", t.sizes());
    return t.const_data_ptr<float>();
  };
  struct Part {
    const float* data;
    int64_t channels;
  };
  std::vector<Part> parts;
  int64_t C = 0;
  for (const at::Tensor& t : x) {
    parts.push_back({fits(t, {B, h, w, t.size(-1)}), t.size(-1)});
    TORCH_CHECK(t.numel() > 0 && t.size(-1) % LANES == 0, "convolve: expected multiples of ", LANES,
                " channels, got x ", t.sizes());
    C += t.size(-1);
  }
  TORCH_CHECK(O > 0 && O % LANES == 0, "convolve: expected multiples of ", LANES, " channels, got ", O, " results");
  const int64_t points = is_winograd ? IN * IN : 1, depth = IN * IN * C / points;
  const float *up = fits(u, {points, panels, depth, PANEL}), *bp = fits(bias, {B, O});
  const float* ap = affine ? fits(*affine, {B, 2, C}) : nullptr;
  const float* sp = skip ? fits(*skip, {B, H, W, O}) : nullptr;
  auto y = pool().empty({B, H, W, O});
  float* yp = y.data_ptr<float>();

  const int64_t down = (H + OUT - 1) / OUT, across = (W + OUT - 1) / OUT, all = B * down * across;
  const int64_t blocks = (all + TILES - 1) / TILES;
  const auto sums = pool().empty({blocks + B - 1, SUMS, O});  // of the part of image b in block k at k + b
  float* partial = sums.data_ptr<float>();
  // where blocks of tiles are too few to keep every thread busy, a task takes some of the panels only
  const int64_t shares = std::clamp<int64_t>(4 * at::get_num_threads() / blocks, 1, panels);
  const int64_t v_step = IN * IN * C + LANES, m_step = points * PANEL + LANES;  // no power of two: cache sets

  at::parallel_for(0, blocks * shares, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = pool().empty({TILES * (v_step + m_step) + IN * (IN - OUT) * C});
    float *v = scratch.data_ptr<float>(), *m = v + TILES * v_step, *seam = m + TILES * m_step;
    for (int64_t task = begin; task < end; task++) {
      const int64_t first = task / shares * TILES, tiles = std::min(TILES, all - first), share = task % shares;

      if (task == begin || share == 0)
        for (int64_t i = 0; i < tiles; i++) {
          const int64_t tile = first + i, b = tile / (down * across);
          const int64_t top = tile / across % down * OUT * stride - padding;
          const int64_t left = tile % across * OUT * stride - padding;
          int64_t pixels[IN * IN];  // that the tile reads; -1 where there is none
          for (int64_t r = 0; r < IN; r++)
            for (int64_t q = 0; q < IN; q++) {
              const bool inside = top + r >= 0 && top + r < large_h && left + q >= 0 && left + q < large_w;
              const int64_t row = (top + r) >> halvings, column = (left + q) >> halvings;
              pixels[r * IN + q] = inside ? (b * h + row) * w + column : -1;
            }
          const bool whole = *std::min_element(pixels, pixels + IN * IN) >= 0;
          // the tile before's last columns are this one's first ones
          const bool follows = is_winograd && whole && i > 0 && left > 0;
          int64_t base = 0;  // the part's first channel
          for (const Part& part : parts) {
            const auto transform = [&](auto whole, auto known) {  // ``known`` columns lie in the seam
              for (int64_t c = 0; c < part.channels; c += LANES) {
                Vec d[IN * IN];
                float* shared = seam + IN * (IN - OUT) * (base + c);
#pragma GCC unroll 6
                for (int64_t r = 0; r < IN; r++) {
                  for (int64_t q = 0; q < known; q++) d[r * IN + q] = load(shared + (r * (IN - OUT) + q) * LANES);
#pragma GCC unroll 6
                  for (int64_t q = known; q < IN; q++) {
                    const int64_t pixel = pixels[r * IN + q];
                    d[r * IN + q] = whole || pixel >= 0 ? load(part.data + pixel * part.channels + c) : Vec{};
                    if (whole && is_winograd)  // what the next tile adds
                      __builtin_prefetch(part.data + (pixel + OUT / scale_factor) * part.channels + c);
                  }
                }
                if (ap != nullptr) {
                  const float* affine = ap + 2 * b * C + base + c;
                  const Vec scale = load(affine), shift = load(affine + C);
                  for (int64_t r = 0; r < IN; r++)
                    for (int64_t q = known; q < IN; q++)  // padding is zero after the activation, not before
                      if (whole || pixels[r * IN + q] >= 0) d[r * IN + q] = silu(d[r * IN + q] * scale + shift);
                }
                if constexpr (is_winograd) {
#pragma GCC unroll 6
                  for (int64_t r = 0; r < IN; r++)
                    for (int64_t q = OUT; q < IN; q++)
                      store(shared + (r * (IN - OUT) + q - OUT) * LANES, d[r * IN + q]);
#pragma GCC unroll 6
                  for (int64_t r = 0; r < IN; r++) transform_inputs(d + r * IN, 1);
#pragma GCC unroll 6
                  for (int64_t q = 0; q < IN; q++) transform_inputs(d + q, IN);
                }
                for (int64_t k = 0; k < IN * IN; k++) store(v + i * v_step + k * C + base + c, d[k]);
              }
            };
            constexpr std::integral_constant<int64_t, 0> none;
            constexpr std::integral_constant<int64_t, IN - OUT> two;
            if (follows) transform(std::true_type{}, two);
            else if (whole) transform(std::true_type{}, none);
            else transform(std::false_type{}, none);
            base += part.channels;
          }
        }

      for (int64_t panel = share * panels / shares; panel < (share + 1) * panels / shares; panel++) {
        for (int64_t k = 0; k < points; k++)
          for (int64_t i = 0; i < tiles; i += ROWS)  // past the last tile: computed, not used
            multiply(v + i * v_step + k * C, up + (k * panels + panel) * depth * PANEL, m + i * m_step + k * PANEL,
                     depth, v_step, m_step);
        std::array<Sums, PANEL / LANES> sums;
        for (int64_t i = 0; i < tiles; i++) {
          const int64_t tile = first + i, b = tile / (down * across);
          const int64_t top = tile / across % down * OUT, left = tile % across * OUT;
          const bool opens = i == 0 || tile % (down * across) == 0;  // an image, of those in this block
          const bool closes = i == tiles - 1 || (tile + 1) % (down * across) == 0;
          for (int64_t half = 0; half < PANEL / LANES; half++) {
            const int64_t o = panel * PANEL + half * LANES;
            if (o >= O) break;
            Vec d[IN * IN];
            for (int64_t k = 0; k < points; k++) d[k] = load(m + i * m_step + k * PANEL + half * LANES);
            if constexpr (is_winograd) {
#pragma GCC unroll 6
              for (int64_t r = 0; r < IN; r++) transform_results(d + r * IN, 1);
#pragma GCC unroll 4
              for (int64_t q = 0; q < OUT; q++) transform_results(d + q, IN);
            }
            const Vec constant = load(bp + b * O + o);
            const int64_t rows = std::min(OUT, H - top), columns = std::min(OUT, W - left);
            Vec sum = {}, square = {};
            for (int64_t r = 0; r < rows; r++)
              for (int64_t q = 0; q < columns; q++) {
                const int64_t at = ((b * H + top + r) * W + left + q) * O + o;
                Vec result = d[r * IN + q] + constant;
                if (sp != nullptr) {
                  __builtin_prefetch(sp + at + OUT * O);  // what the next tile adds
                  result += load(sp + at);
                }
                stream(yp + at, result);
                if (opens && r == 0 && q == 0) sums[half] = {result};
                const Vec apart = result - sums[half].origin;
                sum += apart;
                square += apart * apart;
              }
            sums[half].sum += sum;
            sums[half].square += square;
            sums[half].count += rows * columns;
            if (closes) sums[half].write(partial + (first / TILES + b) * SUMS * O + o, O);
          }
        }
      }
    }
    streamed();
  });
  auto moments = at::empty({B, 2, O}, at::kDouble);
  for (int64_t b = 0; b < B; b++) {
    const int64_t from = b * down * across / TILES + b, to = ((b + 1) * down * across - 1) / TILES + b + 1;
    reduce(partial + from * SUMS * O, partial + to * SUMS * O, O, moments.data_ptr<double>() + 2 * b * O);
  }
  return {y, moments};
}

std::tuple<at::Tensor, at::Tensor> convolve(at::TensorList x, const std::optional<at::Tensor>& affine,
                                            const at::Tensor& u, const at::Tensor& bias,
                                            const std::optional<at::Tensor>& skip, int64_t scale_factor,
                                            int64_t stride) {
  TORCH_CHECK(!x.empty() && x[0].dim() == 4 && u.dim() == 4 && bias.dim() == 2,
              "convolve: expected tensors x (B, h, w, C), u (points, panels, depth, ", PANEL, ") and bias (B, O)");
  TORCH_CHECK((scale_factor == 1 || scale_factor == 2) && (stride == 1 || stride == 2),
              "convolve: expected a scale_factor and a stride of 1 or 2");
  TORCH_CHECK(stride == 1 || (u.size(0) == 1 && scale_factor == 1),
              "convolve: neither Winograd's way nor an enlarged map goes with a stride of 2");
  int64_t C = 0;
  for (const at::Tensor& part : x) C += part.size(-1);
  const auto compute = u.size(0) > 1 ? convolve_by<Winograd>
                                     : u.size(2) > C ? convolve_by<Direct<3>> : convolve_by<Direct<1>>;
  return compute(x, affine, u, bias, skip, scale_factor, stride);
}

// Of x (B, H, W, C), C a multiple of LANES: means and means of squares over the pixels, (B, 2, C) in float64.
at::Tensor moments(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && x.is_cpu() && x.scalar_type() == at::kFloat && x.is_contiguous() &&
                  x.size(3) % LANES == 0,
              "moments: expected a contiguous float32 tensor (B, H, W, C), C a multiple of ", LANES, ", on the CPU");
  const int64_t B = x.size(0), N = x.size(1) * x.size(2), C = x.size(3), chunks = (N + CHUNK - 1) / CHUNK;
  const auto scratch = pool().empty({B * chunks, SUMS, C});
  const float* xp = x.const_data_ptr<float>();
  float* partial = scratch.data_ptr<float>();
  at::parallel_for(0, B * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const float* image = xp + task / chunks * N * C;
      const int64_t first = task % chunks * CHUNK, last = std::min(first + CHUNK, N);
      for (int64_t c = 0; c < C; c += LANES) {
        Sums sums{load(image + first * C + c)};
        for (int64_t n = first; n < last; n++) {
          const Vec apart = load(image + n * C + c) - sums.origin;
          sums.sum += apart;
          sums.square += apart * apart;
        }
        sums.count = last - first;
        sums.write(partial + task * SUMS * C + c, C);
      }
    }
  });
  auto moments = at::empty({B, 2, C}, x.options().dtype(at::kDouble));
  for (int64_t b = 0; b < B; b++)
    reduce(partial + b * chunks * SUMS * C, partial + (b + 1) * chunks * SUMS * C, C,
           moments.data_ptr<double>() + 2 * b * C);
  return moments;
}

// Scale and shift, (B, 2, C), of the group normalisation of a concatenation with these moments, (B, 2, C_p) each:
// scale = weight / sqrt(var + eps), shift = bias - mean scale (Wu and He 2018, "Group Normalization", equation 1).
at::Tensor affine(at::TensorList moments, const at::Tensor& weight, const at::Tensor& bias, int64_t groups,
                  double eps) {
  const at::Tensor all = moments.size() == 1 ? moments[0] : at::cat(moments, 2);
  const auto fits = [&](const at::Tensor& t) {
    return t.is_contiguous() && t.scalar_type() == at::kFloat && t.numel() == all.size(2);
  };
  TORCH_CHECK(all.dim() == 3 && all.size(1) == 2 && all.scalar_type() == at::kDouble && all.is_contiguous() &&
                  groups > 0 && all.size(2) % groups == 0 && fits(weight) && fits(bias),
              "affine: expected moments (B, 2, C) in float64, weight (C,) and bias (C,), C a multiple of ", groups);
  const int64_t B = all.size(0), C = all.size(2), D = C / groups;
  auto result = at::empty({B, 2, C}, at::kFloat);
  const float *wp = weight.const_data_ptr<float>(), *bp = bias.const_data_ptr<float>();
  for (int64_t b = 0; b < B; b++) {
    const double* means = all.const_data_ptr<double>() + 2 * b * C;
    float* scale = result.data_ptr<float>() + 2 * b * C;
    for (int64_t g = 0; g < groups; g++) {
      double mean = 0, square = 0;
      for (int64_t c = g * D; c < (g + 1) * D; c++) {
        mean += means[c] / D;
        square += means[C + c] / D;
      }
      const double inverse = 1 / std::sqrt(std::max(square - mean * mean, 0.) + eps);
      for (int64_t c = g * D; c < (g + 1) * D; c++) {
        scale[c] = wp[c] * inverse;
        scale[C + c] = bp[c] - mean * wp[c] * inverse;
      }
    }
  }
  return result;
}

}  // namespace

TORCH_LIBRARY(spnn_winograd, library) {
  library.def("convolve(Tensor[] x, Tensor? affine, Tensor u, Tensor bias, Tensor? skip, int scale_factor=1,"
              " int stride=1)"
              " -> (Tensor, Tensor)", &convolve);
  library.def("moments(Tensor x) -> Tensor", &moments);
  library.def("affine(Tensor[] moments, Tensor weight, Tensor bias, int groups, float eps) -> Tensor", &affine);
  library.def("empty(int[] shape) -> Tensor", [](at::IntArrayRef shape) { return pool().empty(shape); });
  library.def("lanes() -> int", []() { return LANES; });
}
