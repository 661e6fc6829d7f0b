//! XXH64, streaming, seed 0. Written from the public specification of the algorithm
//! (github.com/Cyan4973/xxHash, doc/xxhash_spec.md).

const P1: u64 = 0x9E37_79B1_85EB_CA87;
const P2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const P3: u64 = 0x1656_67B1_9E37_79F9;
const P4: u64 = 0x85EB_CA77_C2B2_AE63;
const P5: u64 = 0x27D4_EB2F_1656_67C5;
const STRIPE: usize = 32;

/// The state of one hash.
pub(super) struct Xxh64 {
    lanes: [u64; 4],
    /// Bytes that do not fill a stripe yet: `pending[..num_pending]`.
    pending: [u8; STRIPE],
    num_pending: usize,
    total: u64,
}

impl Default for Xxh64 {
    fn default() -> Self {
        let lanes = [P1.wrapping_add(P2), P2, 0, 0u64.wrapping_sub(P1)];
        Xxh64 { lanes, pending: [0; STRIPE], num_pending: 0, total: 0 }
    }
}

impl Xxh64 {
    /// Adds bytes. However a text is cut, its hash is the same.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.total = self.total.wrapping_add(bytes.len() as u64);
        if self.num_pending > 0 {
            let take = bytes.len().min(STRIPE - self.num_pending);
            self.pending[self.num_pending..self.num_pending + take].copy_from_slice(&bytes[..take]);
            self.num_pending += take;
            bytes = &bytes[take..];
            if self.num_pending < STRIPE {
                return;
            }
            let stripe = self.pending;
            self.stripe(&stripe);
            self.num_pending = 0;
        }
        let (stripes, rest) = bytes.as_chunks::<STRIPE>();
        for stripe in stripes {
            self.stripe(stripe);
        }
        self.pending[..rest.len()].copy_from_slice(rest);
        self.num_pending = rest.len();
    }

    /// The hash of everything added so far.
    pub fn finish(&self) -> u64 {
        let mut acc = if self.total < STRIPE as u64 {
            P5
        } else {
            let [a, b, c, d] = self.lanes;
            let mut acc = a
                .rotate_left(1)
                .wrapping_add(b.rotate_left(7))
                .wrapping_add(c.rotate_left(12))
                .wrapping_add(d.rotate_left(18));
            for lane in self.lanes {
                acc = (acc ^ round(0, lane)).wrapping_mul(P1).wrapping_add(P4);
            }
            acc
        };
        acc = acc.wrapping_add(self.total);
        let (words, rest) = self.pending[..self.num_pending].as_chunks::<8>();
        for word in words {
            acc ^= round(0, u64::from_le_bytes(*word));
            acc = acc.rotate_left(27).wrapping_mul(P1).wrapping_add(P4);
        }
        let (halves, rest) = rest.as_chunks::<4>();
        for half in halves {
            acc ^= u64::from(u32::from_le_bytes(*half)).wrapping_mul(P1);
            acc = acc.rotate_left(23).wrapping_mul(P2).wrapping_add(P3);
        }
        for &byte in rest {
            acc ^= u64::from(byte).wrapping_mul(P5);
            acc = acc.rotate_left(11).wrapping_mul(P1);
        }
        acc = (acc ^ (acc >> 33)).wrapping_mul(P2);
        acc = (acc ^ (acc >> 29)).wrapping_mul(P3);
        acc ^ (acc >> 32)
    }

    fn stripe(&mut self, stripe: &[u8; STRIPE]) {
        let (words, _) = stripe.as_chunks::<8>();
        for (lane, word) in self.lanes.iter_mut().zip(words) {
            *lane = round(*lane, u64::from_le_bytes(*word));
        }
    }
}

fn round(acc: u64, word: u64) -> u64 {
    acc.wrapping_add(word.wrapping_mul(P2)).rotate_left(31).wrapping_mul(P1)
}

#[cfg(test)]
mod tests {
    use super::Xxh64;

    fn hash(bytes: &[u8]) -> u64 {
        let mut hash = Xxh64::default();
        hash.update(bytes);
        hash.finish()
    }

    #[test]
    fn published_values() {
        // The first three from the project's own tests and documentation.
        assert_eq!(hash(b""), 0xEF46_DB37_51D8_E999);
        assert_eq!(hash(b"a"), 0xD24E_C4F1_A98C_6E5B);
        assert_eq!(hash(b"abc"), 0x44BC_2CF5_AD77_0999);
    }

    #[test]
    fn cuts_do_not_matter() {
        let bytes: Vec<u8> = (0..201u8).collect();
        let whole = hash(&bytes);
        // From the `xxhash` package of Python.
        assert_eq!(whole, 0x6FB6_526B_C778_8ECF);
        assert_eq!(hash(&bytes[..32]), 0xCBF5_9C51_16FF_32B4);
        for cut in 0..bytes.len() {
            let mut parts = Xxh64::default();
            parts.update(&bytes[..cut]);
            parts.update(&bytes[cut..]);
            assert_eq!(parts.finish(), whole, "cut at {cut}");
        }
    }
}
