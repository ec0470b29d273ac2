// A stand-in for glibc's libpthread while libfastcl_cuda.so is linked: these functions, at the versions of the .map file beside it.
//
// glibc 2.34 moved them into libc.so.6 under that version, and what is linked on a newer system asks for it, although
// nothing has changed in them. The loader of any glibc finds the old versions: those of before 2.34 in this library, later ones
// in libc.so.6. The list is what NVIDIA's libcudart_static.a takes from there; the wheel's audit finds one that is missing.
#define OLD(name) \
  extern "C" void name() {}
OLD(pthread_condattr_setpshared) OLD(pthread_create) OLD(pthread_detach) OLD(pthread_getspecific) OLD(pthread_join)
OLD(pthread_key_create) OLD(pthread_key_delete) OLD(pthread_kill) OLD(pthread_mutex_trylock) OLD(pthread_mutexattr_destroy)
OLD(pthread_mutexattr_init) OLD(pthread_mutexattr_setpshared) OLD(pthread_mutexattr_settype) OLD(pthread_once)
OLD(pthread_rwlock_destroy) OLD(pthread_rwlock_init) OLD(pthread_rwlock_rdlock) OLD(pthread_rwlock_timedrdlock)
OLD(pthread_rwlock_timedwrlock) OLD(pthread_rwlock_tryrdlock) OLD(pthread_rwlock_trywrlock) OLD(pthread_rwlock_unlock)
OLD(pthread_rwlock_wrlock) OLD(pthread_rwlockattr_destroy) OLD(pthread_rwlockattr_init) OLD(pthread_rwlockattr_setpshared)
OLD(pthread_setspecific) OLD(pthread_spin_destroy) OLD(pthread_spin_init) OLD(pthread_spin_lock) OLD(pthread_spin_trylock)
OLD(pthread_spin_unlock) OLD(sem_destroy) OLD(sem_init) OLD(sem_post) OLD(sem_timedwait) OLD(sem_trywait) OLD(sem_wait)
