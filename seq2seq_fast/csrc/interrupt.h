// Signals, Ctrl-C among them, while a long call runs without the GIL.
#pragma once

namespace seq2seq_fast {

// Whether the handler of a signal has raised an exception, which then waits for Python to take it
// (`interruption` of module.cpp) once the call has ended with any error. To be asked now and then:
// it looks five times a second, and in the process's main thread alone, which handles all signals.
bool interrupted();

}  // namespace seq2seq_fast
