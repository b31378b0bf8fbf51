// The bodies of the CUDA kernels, run on the host by the emulation: a module of the tests, no part of the package.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "device.h"
#include "greedy_cuda.h"
#include "spectrum_cuda.h"
#include "whitening_cuda.h"

namespace py = pybind11;

namespace spectral_kernels::device {
namespace {

Order order_of(bool descending) { return descending ? Order::kDescending : Order::kAscending; }

template <class Shape, class T>
void run_small(const T* matrices, T* values, int batches, int d, bool largest, bool descending) {
  Machine::launch(batches, 1, Shape::kThreads, sizeof(typename Shape::Shared), order_of(descending),
                  [&](unsigned char* shared) { Shape::run(matrices, values, d, largest, shared); });
}

template <class T>
py::array_t<T> spectrum(py::array_t<T, py::array::c_style> matrices, bool largest, bool descending) {
  using Shapes = SpectrumShapes<T>;
  const int batches = static_cast<int>(matrices.shape(0)), d = static_cast<int>(matrices.shape(1));
  py::array_t<T> values({batches, largest ? 1 : d});
  if (d <= 32) {
    run_small<typename Shapes::Size32>(matrices.data(), values.mutable_data(), batches, d, largest, descending);
  } else if (d <= 64) {
    run_small<typename Shapes::Size64>(matrices.data(), values.mutable_data(), batches, d, largest, descending);
  } else if (d <= 128) {
    run_small<typename Shapes::Size128>(matrices.data(), values.mutable_data(), batches, d, largest, descending);
  } else {
    std::vector<T> work(matrices.data(), matrices.data() + matrices.size());
    Machine::launch(
        batches, 1, Shapes::Large::kThreads, Shapes::Large::shared_bytes(d), order_of(descending),
        [&](unsigned char* shared) { Shapes::Large::run(work.data(), values.mutable_data(), d, largest, shared); });
  }
  return values;
}

using Indices = py::array_t<int64_t, py::array::c_style>;

/// On a chip of `multiprocessors`, each with `limit` bytes of shared memory.
template <class T>
py::tuple greedy_select(py::array_t<T, py::array::c_style> pool, Indices start, std::optional<Indices> draws,
                        std::optional<py::array_t<bool, py::array::c_style>> valid, Indices seed, int k, bool logdet,
                        bool normalize, int multiprocessors, size_t limit, bool descending,
                        std::optional<Indices> words) {
  constexpr int threads = 64;
  const int b = static_cast<int>(pool.shape(0)), n = static_cast<int>(pool.shape(1)),
            d = static_cast<int>(pool.shape(2));
  Indices indices({b, k});
  py::array_t<T> ranks({b, k}), objectives({b, k});
  const GreedyArguments<T> in{pool.data(),
                              start.data(),
                              draws ? draws->data() : nullptr,
                              valid ? valid->data() : nullptr,
                              seed.data(),
                              indices.mutable_data(),
                              ranks.mutable_data(),
                              objectives.mutable_data(),
                              words ? words->mutable_data() : nullptr,
                              b,
                              n,
                              d,
                              k,
                              static_cast<int>(start.shape(1)),
                              draws ? static_cast<int>(draws->shape(2)) : 0,
                              logdet,
                              normalize};
  const GreedyPlan plan = GreedyPlan::make(in, multiprocessors, limit);
  if (plan.members == 0) throw std::runtime_error("the pool does not fit");
  struct alignas(128) Line {
    unsigned char bytes[128];
  };
  std::vector<Line> memory(plan.scratch / sizeof(Line));
  unsigned char* const scratch = reinterpret_cast<unsigned char*>(memory.data());
  std::fill(scratch + plan.rows, scratch + plan.scratch, static_cast<unsigned char>(0xff));
  const int blocks = plan.groups * plan.members;
  Machine::launch(blocks, blocks, threads, plan.shared, order_of(descending), [&](unsigned char* shared) {
    if (logdet) {
      GreedyGrid<T, true>(in, plan, shared, scratch, threads).run();
    } else {
      GreedyGrid<T, false>(in, plan, shared, scratch, threads).run();
    }
  });
  return py::make_tuple(indices, ranks, objectives, py::make_tuple(plan.groups, plan.members, plan.by_draw, plan.kept));
}

template <class T>
py::tuple whitening_matrix(py::array_t<T, py::array::c_style> covariances, py::array_t<T, py::array::c_style> mean,
                           double shrinkage, double negligible, double least, bool descending) {
  const int batches = static_cast<int>(covariances.shape(0)), d = static_cast<int>(covariances.shape(1));
  py::array_t<T> matrices({batches, d, d});
  py::array_t<int> singular(batches);
  const WhiteningArguments<T> arguments{covariances.mutable_data(),
                                        mean.data(),
                                        matrices.mutable_data(),
                                        singular.mutable_data(),
                                        d,
                                        shrinkage,
                                        negligible,
                                        least};
  Machine::launch(batches, 1, kWhiteningThreads, whitening_shared_bytes(d), order_of(descending),
                  [&](unsigned char* shared) { WhiteningMatrix<T>(arguments, shared).run(); });
  return py::make_tuple(matrices, singular);
}

/// Each thread's right neighbour, by way of shared memory.
std::vector<int> neighbours(bool with_barrier, bool descending) {
  constexpr int threads = 64;
  std::vector<int> found(threads);
  Machine::launch(1, 1, threads, threads * sizeof(int), order_of(descending), [&](unsigned char* memory) {
    int* const shared = reinterpret_cast<int*>(memory);
    const int thread = thread_index();
    shared[thread] = thread;
    if (with_barrier) barrier();
    found[static_cast<size_t>(thread)] = shared[(thread + 1) % threads];
  });
  return found;
}

/// A CTA whose threads part ways.
void divergent(const std::string& where) {
  Machine::launch(1, 1, 64, 0, Order::kAscending, [&](unsigned char*) {
    if (where == "barrier" && thread_index() < 40) barrier();
    if (where == "shuffle") thread_index() % 2 == 0 ? shuffle(1, 0) : shuffle_xor(1, 1);
    while (where == "spin" && thread_index() < 40) spin();
  });
}

}  // namespace
}  // namespace spectral_kernels::device

PYBIND11_MODULE(emulation, m) {
  using namespace spectral_kernels::device;
  m.def("spectrum", &spectrum<float>, py::arg("matrices").noconvert(), py::arg("largest"), py::arg("descending"));
  m.def("spectrum", &spectrum<double>, py::arg("matrices").noconvert(), py::arg("largest"), py::arg("descending"));
  m.def("neighbours", &neighbours, py::arg("barrier"), py::arg("descending"));
  m.def("divergent", &divergent);
  m.def("greedy_select", &greedy_select<float>, py::arg("pool").noconvert(), py::arg("start"), py::arg("draws"),
        py::arg("valid"), py::arg("seed"), py::arg("k"), py::arg("logdet"), py::arg("normalize"),
        py::arg("multiprocessors"), py::arg("limit"), py::arg("descending"), py::arg("words") = py::none());
  m.def("greedy_select", &greedy_select<double>, py::arg("pool").noconvert(), py::arg("start"), py::arg("draws"),
        py::arg("valid"), py::arg("seed"), py::arg("k"), py::arg("logdet"), py::arg("normalize"),
        py::arg("multiprocessors"), py::arg("limit"), py::arg("descending"), py::arg("words") = py::none());
  m.def("whitening_matrix", &whitening_matrix<float>, py::arg("covariances").noconvert(), py::arg("mean").noconvert(),
        py::arg("shrinkage"), py::arg("negligible"), py::arg("least"), py::arg("descending"));
  m.def("whitening_matrix", &whitening_matrix<double>, py::arg("covariances").noconvert(), py::arg("mean").noconvert(),
        py::arg("shrinkage"), py::arg("negligible"), py::arg("least"), py::arg("descending"));
  m.def("whitening_bytes", &whitening_shared_bytes, py::arg("d"));
}
