// A device of its own for tests on machines with no accelerator. It goes by the name of one that PyTorch knows but does not build,
// `hpu`: whose memory is the host's and
// whose arithmetic is the CPU's, to the bit. As on CUDA, operators refuse tensors of two devices. It counts its bytes.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>

#include <atomic>
#include <unordered_map>
#include <mutex>
#include <set>

namespace {

constexpr auto BOX = c10::DeviceType::HPU;
std::mutex lock;
std::unordered_map<void*, size_t> sizes;
size_t held = 0, peak = 0;

void release(void* memory) {
  {
    std::lock_guard<std::mutex> guard(lock);
    auto found = sizes.find(memory);
    if (found != sizes.end()) { held -= found->second; sizes.erase(found); }
  }
  c10::free_cpu(memory);
}

struct BoxAllocator final : public at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(bytes);
    if (memory) {
      std::lock_guard<std::mutex> guard(lock);
      sizes[memory] = bytes;
      held += bytes;
      peak = std::max(peak, held);
    }
    return {memory, memory, &release, at::Device(BOX, 0)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};

BoxAllocator allocator;
REGISTER_ALLOCATOR(BOX, &allocator);

// The CPU's view of a tensor of the box: the same memory.
at::Tensor on_cpu(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  auto storage = tensor.storage();
  return at::from_blob(static_cast<char*>(storage.mutable_data()) + tensor.storage_offset() * tensor.element_size(),
                       tensor.sizes(), tensor.strides(), [storage](void*) {}, tensor.options().device(at::kCPU));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::HPU),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::HPU),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  on_cpu(to).copy_(on_cpu(self));
  return to;
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  auto wanted = at::detail::computeStorageNbytesContiguous(size, self.dtype().itemsize(), self.storage_offset());
  if (wanted > self.storage().nbytes()) {
    auto memory = allocator.allocate(wanted);
    std::memcpy(memory.get(), self.storage().data(), self.storage().nbytes());
    self.storage().set_data_ptr_noswap(std::move(memory));
    self.storage().set_nbytes(wanted);
  }
  impl->set_sizes_contiguous(size);
  return self;
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset) start = offset->expect_int();
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Scalar local_scalar(const at::Tensor& self) { return on_cpu(self).item(); }

// What CUDA takes on the host beside tensors of its own: indices.
const std::set<std::string> MIXES = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_",
                                     "aten::index.Tensor_out"};

// What CUDA has no deterministic kernel for, of floating-point numbers.
const std::set<std::string> UNORDERED = {"aten::cumsum", "aten::cumprod", "aten::histc", "aten::put_",
                                         "aten::nll_loss2d_forward"};

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  bool box = false, host = false;
  auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.is_cpu()) host = host || tensor.dim() > 0; else box = true;
  };
  for (const auto& value : torch::jit::last(*stack, schema.arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    else if (value.isTensorList()) for (const at::Tensor& each : value.toTensorList()) look(each);
    else if (value.isList())
      for (const c10::IValue& each : value.toListRef()) if (each.isTensor()) look(each.toTensor());
  }
  TORCH_CHECK(!(box && host) || MIXES.count(schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name())),
              "Expected all tensors to be on the same device, but found the box and cpu: ", schema.name());
  const auto& first = torch::jit::last(*stack, schema.arguments().size()).front();
  if (box && UNORDERED.count(schema.name()) && first.isTensor() && first.toTensor().is_floating_point())
    at::globalContext().alertNotDeterministic(schema.name());
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

}  // namespace

namespace at {
struct HPUHooks final : public HPUHooksInterface {
  explicit HPUHooks(HPUHooksArgs = {}) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasHPU() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

REGISTER_HPU_HOOKS(HPUHooks)
}

namespace c10::impl {
// Everything is done when it is asked for: there is nothing to wait for.
struct BoxGuard final : public NoOpDeviceGuardImpl<c10::DeviceType::HPU> {
  static Stream only() { return Stream(Stream::DEFAULT, Device(DeviceType::HPU, 0)); }
  Device exchangeDevice(Device) const override { return Device(DeviceType::HPU, 0); }
  Device getDevice() const override { return Device(DeviceType::HPU, 0); }
  Stream getStream(Device) const noexcept override { return only(); }
  Stream getDefaultStream(Device) const override { return only(); }
  Stream getNewStream(Device, int) const override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(HPU, BoxGuard)
}

TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize);
  m.impl("view", view);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("_local_scalar_dense", local_scalar);
}

TORCH_LIBRARY_IMPL(_, HPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("held_bytes", [] { std::lock_guard<std::mutex> guard(lock); return held; });
  m.def("peak_bytes", [] { std::lock_guard<std::mutex> guard(lock); return peak; });
  m.def("reset_peak", [] { std::lock_guard<std::mutex> guard(lock); peak = held; });
}
