// The Python module: importing it runs the static registrations of the other files. Its names say
// which instruction set the CPU kernels run in, and which GPUs the CUDA kernels were compiled for:
// compute capabilities such as "80 90", "" where they are left out. Later GPUs run them as well,
// earlier ones do not.
#include <Python.h>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <chrono>

#include "cpu/loops.h"
#include "interrupt.h"

#ifndef S2S_CUDA_ARCHITECTURES
#define S2S_CUDA_ARCHITECTURES ""
#endif

namespace seq2seq_fast {
namespace {

// By a signal's handler: of the thread that ran it, so that no other takes it away.
thread_local PyObject* raised = nullptr;

bool in_main_thread() {
#ifdef __linux__
  return syscall(SYS_gettid) == getpid();
#else
  return true;  // Python asks as well, once it has the GIL
#endif
}

PyObject* interruption(PyObject*, PyObject*) {
  PyObject* found = raised;
  raised = nullptr;
  return found != nullptr ? found : Py_NewRef(Py_None);
}

PyMethodDef methods[] = {
    {"interruption", interruption, METH_NOARGS,
     "The exception that a signal's handler raised and that ended a call, or None: once."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool interrupted() {
  using Clock = std::chrono::steady_clock;
  thread_local Clock::time_point next;
  const auto now = Clock::now();
  if (now < next) return false;
  next = now + std::chrono::milliseconds(200);
  if (!in_main_thread() || !Py_IsInitialized()) return false;
  const PyGILState_STATE gil = PyGILState_Ensure();
  const bool stops = PyErr_CheckSignals() != 0;
  if (stops) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (trace != nullptr) PyException_SetTraceback(value, trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    Py_XDECREF(raised);
    raised = value;
  }
  PyGILState_Release(gil);
  return stops;
}

}  // namespace seq2seq_fast

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef def = {.m_base = PyModuleDef_HEAD_INIT,
                            .m_name = "_C",
                            .m_size = -1,
                            .m_methods = seq2seq_fast::methods};
  PyObject* module = PyModule_Create(&def);
  if (module != nullptr &&
      (PyModule_AddStringConstant(module, "cpu_capability", seq2seq_fast::loops.name) != 0 ||
       PyModule_AddStringConstant(module, "cuda_architectures", S2S_CUDA_ARCHITECTURES) != 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
