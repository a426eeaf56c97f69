// Rotary position embedding of queries and keys on the CPU; what it computes is said in vjepa_fast/ops/rope3d.py.
//
// PyTorch's operators pass over the buffer four times, and twice more to copy a gradient; this reads and writes it once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "checks.h"

namespace vjepa_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements that make a task worth a thread.
constexpr int64_t kElementsPerTask = 1 << 15;

struct Layout {
  int64_t tokens, head_dim, heads, axis, x_stride, y_stride;
  int64_t grid[3];
};

// y = x cos + (x with the elements of each pair exchanged) sin for `count` elements, which is even; y may be x.
void turn(const float* x, float* y, const float* cos, const float* sin, int64_t count) {
  int64_t i = 0;
#if defined(__SSE2__)
  for (; i + 4 <= count; i += 4) {
    const __m128 pairs = _mm_loadu_ps(x + i);
    const __m128 exchanged = _mm_shuffle_ps(pairs, pairs, _MM_SHUFFLE(2, 3, 0, 1));
    const __m128 along = _mm_mul_ps(pairs, _mm_loadu_ps(cos + i));
    _mm_storeu_ps(y + i, _mm_add_ps(along, _mm_mul_ps(exchanged, _mm_loadu_ps(sin + i))));
  }
#endif
  for (; i < count; i += 2) {
    const float a = x[i], b = x[i + 1];
    y[i] = a * cos[i] + b * sin[i];
    y[i + 1] = b * cos[i + 1] + a * sin[i + 1];
  }
}

void turn(const double* x, double* y, const double* cos, const double* sin, int64_t count) {
  for (int64_t i = 0; i < count; i += 2) {
    const double a = x[i], b = x[i + 1];
    y[i] = a * cos[i] + b * sin[i];
    y[i + 1] = b * cos[i + 1] + a * sin[i + 1];
  }
}

// Tokens from begin to end; false where one lies behind the table.
template <typename Real>
bool rotate(const Layout& of, const Real* x, Real* y, const int32_t* ids, const Real* cos, const Real* sin,
            int64_t begin, int64_t end) {
  const auto [frames, height, width] = of.grid;
  const int64_t turned = 3 * of.axis;
  std::vector<Real> row(size_t(2 * turned));
  Real* const own_cos = row.data();
  Real* const own_sin = own_cos + turned;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t id = ids[token], frame = id / (height * width), inside = id % (height * width);
    if (id < 0 || frame >= frames) return false;
    const int64_t places[3] = {frame, frames + inside / width, frames + height + inside % width};
    for (int64_t axis = 0; axis < 3; ++axis) {
      const auto bytes = size_t(of.axis) * sizeof(Real);
      std::memcpy(own_cos + axis * of.axis, cos + places[axis] * of.axis, bytes);
      std::memcpy(own_sin + axis * of.axis, sin + places[axis] * of.axis, bytes);
    }
    const Real* from = x + token * of.x_stride;
    Real* to = y + token * of.y_stride;
    for (int64_t head = 0; head < 2 * of.heads; ++head, from += of.head_dim, to += of.head_dim) {
      turn(from, to, own_cos, own_sin, turned);
      if (from != to) std::copy(from + turned, from + of.head_dim, to + turned);
    }
    if (from != to) std::copy(from, from + of.heads * of.head_dim, to);
  }
  return true;
}

template <typename Real>
void rotate_all(const Layout& of, const Tensor& x, Tensor& y, const Tensor& ids, const Tensor& cos,
                const Tensor& sin) {
  std::atomic<bool> inside{true};
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (3 * of.heads * of.head_dim));
  torch::stable::parallel_for(0, of.tokens, grain, [&](int64_t begin, int64_t end) {
    if (!rotate(of, x.const_data_ptr<Real>(), y.mutable_data_ptr<Real>(), ids.const_data_ptr<int32_t>(),
                cos.const_data_ptr<Real>(), sin.const_data_ptr<Real>(), begin, end)) {
      inside = false;
    }
  });
  check(inside, "a token id is not on the grid of ", of.grid[0], " x ", of.grid[1], " x ", of.grid[2], " tokens");
}

void check_operand(const char* name, const Tensor& tensor, ScalarType dtype, int64_t rows, int64_t columns) {
  check(tensor.scalar_type() == dtype, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
        "; expected ", torch::headeronly::toString(dtype));
  check(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, " is not [", rows, ", ",
        columns, "]");
  check(tensor.stride(1) == 1 && (rows < 2 || tensor.stride(0) >= columns), name,
        " has rows that overlap, or whose elements are not side by side");
}

void rope3d_rotate(const Tensor& x, Tensor y, const Tensor& ids, const Tensor& cos, const Tensor& sin,
                   std::vector<int64_t> grid, int64_t num_heads) {
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double, "x has dtype ",
        torch::headeronly::toString(dtype), "; expected Float or Double");
  check(x.dim() == 2 && num_heads > 0 && x.size(1) % (3 * num_heads) == 0, "x is not [L, 3 H D] with H = ", num_heads);
  check(grid.size() == 3, "grid has ", grid.size(), " integers; expected 3");
  for (const int64_t side : grid) check_range("a side of grid", side, 1, 1 << 20);
  check_operand("x", x, dtype, x.size(0), x.size(1));
  check_operand("y", y, dtype, x.size(0), x.size(1));
  check(ids.scalar_type() == ScalarType::Int && ids.dim() == 1 && ids.size(0) == x.size(0) &&
            (ids.size(0) < 2 || ids.stride(0) == 1),
        "ids is not a dense Int tensor with one entry a row of x");
  check(cos.dim() == 2, "cos has ", cos.dim(), " dimensions; expected 2");
  const Layout of{x.size(0), x.size(1) / (3 * num_heads), num_heads, cos.size(1), x.stride(0), y.stride(0),
                  {grid[0], grid[1], grid[2]}};
  check(of.axis % 2 == 0 && 3 * of.axis <= of.head_dim, "cos has ", of.axis, " columns; expected an even number, at ",
        "most a third of head width ", of.head_dim);
  for (const auto& [name, table] : {std::pair{"cos", &cos}, std::pair{"sin", &sin}}) {
    check_operand(name, *table, dtype, grid[0] + grid[1] + grid[2], of.axis);
    check(table->stride(0) == of.axis || table->size(0) < 2, name, " is not dense");
  }
  if (dtype == ScalarType::Float) {
    rotate_all<float>(of, x, y, ids, cos, sin);
  } else {
    rotate_all<double>(of, x, y, ids, cos, sin);
  }
}

}  // namespace
}  // namespace vjepa_fast

STABLE_TORCH_LIBRARY_FRAGMENT(vjepa_fast, m) {
  m.def(
      "rope3d_rotate(Tensor x, Tensor(a!) y, Tensor ids, Tensor cos, Tensor sin, int[] grid, int num_heads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vjepa_fast, CPU, m) {
  m.impl("rope3d_rotate", TORCH_BOX(&vjepa_fast::rope3d_rotate));
}
