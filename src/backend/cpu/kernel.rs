//! `kernel!`: a function over any vector implementation, run on the best one of the machine.

/// Declares `fn name(args)` whose body may use the vector type `V`. The body is compiled once per instruction
/// set. A reference argument names its lifetime `'a`.
macro_rules! kernel {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$v:ident>($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<'a>($($arg: $ty),*) {
            struct Args<'a>($($ty,)* std::marker::PhantomData<&'a ()>);
            impl $crate::backend::cpu::simd::Kernel for Args<'_> {
                type Out = ();
                #[inline(always)]
                #[allow(unused_unsafe, clippy::undocumented_unsafe_blocks)]
                unsafe fn run<$v: $crate::backend::cpu::simd::F32x16>(self) {
                    let Args($($arg,)* _) = self;
                    // SAFETY: `V`'s instruction set is present, by the contract of `Kernel::run`; slices are
                    // checked by the body before their pointers are used.
                    unsafe { $body }
                }
            }
            $crate::backend::cpu::simd::dispatch(Args($($arg,)* std::marker::PhantomData))
        }
    };
}

pub(crate) use kernel;
