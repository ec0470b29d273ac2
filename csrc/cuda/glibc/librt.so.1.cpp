// As libpthread.so.0.cpp.
#define OLD(name) \
  extern "C" void name() {}
OLD(shm_open) OLD(shm_unlink)
