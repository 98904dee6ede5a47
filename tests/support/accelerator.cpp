// An accelerator whose memory is the host's: torch's PrivateUse1, with two devices.
//
// Every operator runs on the CPU, by torch's own fallback, and has ended when it returns. What is
// late, as on real devices, is a copy to the host that does not block: its values arrive when the
// host waits, and are garbage before. A watcher is told of every operator that CUDA would launch, and
// of everything for which CUDA would make the host wait. tests/support/accelerator.py builds and
// loads this file.

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::Stream;
constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;

thread_local c10::DeviceIndex current = 0;
std::mutex mutex;
std::map<const char*, size_t> pinned;                 // begin, size
std::vector<std::pair<Tensor, Tensor>> not_arrived;   // on the host; what will be there

// Called with "launch" or "wait", and with what does it.
using Watcher = void (*)(const char* kind, const char* what);
Watcher watcher = nullptr;
thread_local bool by_fallback = false;  // copies to the CPU and back, which a device would not make

void tell(const char* kind, const std::string& what) {
  if (watcher != nullptr && !by_fallback) watcher(kind, what.c_str());
}

// Everything on the device has ended.
void wait() {
  std::vector<std::pair<Tensor, Tensor>> copies;
  {
    std::lock_guard<std::mutex> lock(mutex);
    copies.swap(not_arrived);
  }
  for (auto& [there, values] : copies) there.copy_(values);
}

void* memory(size_t size) { return size ? std::aligned_alloc(64, (size + 63) / 64 * 64) : nullptr; }

void unpin(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  pinned.erase(static_cast<const char*>(pointer));
  std::free(pointer);
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* pointer = memory(size);
    return {pointer, pointer, &std::free, Device(kDevice, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* pointer = memory(size ? size : 1);
    std::lock_guard<std::mutex> lock(mutex);
    pinned[static_cast<const char*>(pointer)] = size;
    return {pointer, pointer, &unpin, Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  Device exchangeDevice(Device device) const override {
    Device old = getDevice();
    setDevice(device);
    return old;
  }
  Device getDevice() const override { return Device(kDevice, current); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void** event, const Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {
    *event = &mutex;  // any address: an event that was recorded
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return not_arrived.empty(); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {
    tell("wait", "synchronize a stream");
    wait();
  }
  void synchronizeEvent(void*) const override {
    tell("wait", "synchronize an event");
    wait();
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    tell("wait", "synchronize the device");
    wait();
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  bool isPinnedPtr(const void* data) const override {
    auto pointer = static_cast<const char*>(data);
    std::lock_guard<std::mutex> lock(mutex);
    auto after = pinned.upper_bound(pointer);
    if (after == pinned.begin()) return false;
    auto [begin, size] = *std::prev(after);
    return pointer < begin + size || pointer == begin;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
};
Hooks hooks;

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
             std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(kDevice)));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_memory,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(kDevice)));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &device_memory,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the host.
Tensor on_host(const Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  Tensor host = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                              tensor.options().device(at::kCPU));
  host._set_conj(tensor.is_conj());
  host._set_neg(tensor.is_neg());
  return host;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  tell("launch", "copy");
  if (!from.is_cpu() && !to.is_cpu()) {
    on_host(to).copy_(on_host(from));
    return to;
  }
  const Tensor& host = from.is_cpu() ? from : to;
  bool waits = !non_blocking || !(host.numel() == 0 || hooks.isPinnedPtr(host.data_ptr()));
  if (waits) {
    tell("wait", std::string("copy ") + (from.is_cpu() ? "to the device" : "to the host") +
                     (non_blocking ? ", not pinned" : ""));
    if (!by_fallback) wait();
    on_host(to).copy_(on_host(from));
  } else if (from.is_cpu()) {
    on_host(to).copy_(from);
  } else {
    Tensor values = on_host(from).clone();
    if (to.is_contiguous() && to.numel()) std::memset(to.data_ptr(), 0x7f, to.nbytes());
    std::lock_guard<std::mutex> lock(mutex);
    not_arrived.emplace_back(to, values);
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& tensor) {
  tell("wait", "read a value");
  wait();
  return on_host(tensor).item();
}

const Tensor& resize(const Tensor& tensor, c10::SymIntArrayRef sizes,
                     std::optional<at::MemoryFormat>) {
  auto size = C10_AS_INTARRAYREF_SLOW(sizes);
  int64_t bytes = tensor.storage_offset() * tensor.element_size();
  bytes += c10::multiply_integers(size) * tensor.element_size();
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  if (static_cast<int64_t>(storage->nbytes()) < bytes) {
    c10::DeviceGuard guard(tensor.device());
    auto data = device_memory.allocate(bytes);
    if (storage->nbytes()) std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr(std::move(data));
    storage->set_nbytes(bytes);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return tensor;
}

Tensor as_strided(const Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

Tensor view(const Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size),
                                    C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& tensor, at::Storage storage, c10::SymInt offset,
                    c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(tensor, std::move(storage), offset.expect_int(),
                                      C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_whole_storage(Tensor& tensor, at::Storage storage) {
  return at::native::set_(tensor, std::move(storage));
}

// Whether CUDA would wait: for a size that depends on values, for indices on the host, or for numbers
// on the host that `where` copies to the device.
bool waits(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const std::string& name = op.schema().name();
  for (const char* known : {"nonzero", "masked_select", "equal", "_unique", "_unique2",
                            "unique_dim", "unique_consecutive", "bincount"})
    if (name == std::string("aten::") + known) return true;
  size_t first = stack.size() - op.schema().arguments().size();
  if (name == "aten::repeat_interleave") return stack[first + 1].isNone();
  if (name == "aten::where") {
    for (size_t i = first; i < stack.size(); ++i)
      if (stack[i].isTensor() && stack[i].toTensor().is_cpu() &&
          !stack[i].toTensor().unsafeGetTensorImpl()->is_wrapped_number())
        return true;
    return false;
  }
  if (name != "aten::index" && name != "aten::index_put_" && name != "aten::_index_put_impl_")
    return false;
  for (const c10::IValue& each : stack[first + 1].toListRef()) {
    if (each.isNone()) continue;
    const Tensor& index = each.toTensor();
    auto type = index.scalar_type();
    if (index.is_cpu() || type == at::kBool || type == at::kByte) return true;
  }
  return false;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::string name = op.schema().name().substr(6);  // without "aten::"
  tell("launch", name);
  if (waits(op, *stack)) tell("wait", name);
  bool before = by_fallback;
  by_fallback = true;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    by_fallback = before;
    throw;
  }
  by_fallback = before;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("unfold", at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
}

// One launch, as on CUDA: by default each would be an operator for every tensor.
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames())
    if (name.name.rfind("aten::_foreach_", 0) == 0)
      m.impl((name.overload_name.empty() ? name.name : name.name + "." + name.overload_name).c_str(),
             torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY(toy, m) {
  m.def("host_view", on_host);
}

struct Registered {
  Registered() {
    c10::SetAllocator(kDevice, &device_memory);
    at::RegisterPrivateUse1HooksInterface(&hooks);
  }
} registered;

}  // namespace

extern "C" void set_current_device(int index) { current = static_cast<c10::DeviceIndex>(index); }
extern "C" int current_device() { return current; }
extern "C" void synchronize() { wait(); }
extern "C" void watch(Watcher new_watcher) { watcher = new_watcher; }
