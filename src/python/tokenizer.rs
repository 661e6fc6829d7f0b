//! `qwen35rs.Tokenizer`: strings and lists of ints in and out, over [`crate::tokenizer`].

use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};

use numpy::PyArray1;
use pyo3::exceptions::{PyIndexError, PyOverflowError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyInt, PyList, PyString};

use super::{enter, to_py};
use crate::Error;
use crate::backend::cpu::parallel::claim;
use crate::tokenizer::{TextStream, Tokenizer, prefetch};

/// Registers the classes of this file.
pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyTokenizer>()?;
    m.add_class::<PyDecodeStream>()
}

/// Token ids of text and text of token ids, exactly as the checkpoint's `tokenizer.json` says.
///
/// Immutable; any number of threads may use one.
#[pyclass(name = "Tokenizer", module = "qwen35rs", frozen)]
pub(crate) struct PyTokenizer {
    pub(crate) inner: Arc<Tokenizer>,
    /// Python ints by id, so that a list of ids allocates none.
    ints: PyOnceLock<Vec<Py<PyInt>>>,
    /// Ids on their way into a list, for the next call.
    buffer: Mutex<Vec<u32>>,
    direct_items: PyOnceLock<bool>,
}

impl PyTokenizer {
    pub(crate) fn new(tokenizer: Tokenizer) -> Self {
        PyTokenizer {
            inner: Arc::new(tokenizer),
            ints: PyOnceLock::new(),
            buffer: Mutex::new(Vec::new()),
            direct_items: PyOnceLock::new(),
        }
    }

    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        let ints = self.ints.get_or_try_init(py, || {
            (0..self.inner.len()).map(|id| Ok(id.into_pyobject(py)?.unbind())).collect::<PyResult<Vec<_>>>()
        })?;
        // SAFETY: PyList_New gives an owned list with room for all items, every one of which is set once before the
        // list is seen by anyone. The reference that the list takes is made by adding to the count directly, as
        // Py_INCREF does in the limited API of Python 3.10, and the items are written where `items_at` found them;
        // with a call of PyO3 for each of both, a list of ids takes twice the time. The GIL is held, and this crate
        // has no free-threaded build.
        unsafe {
            let list = Bound::from_owned_ptr_or_err(py, ffi::PyList_New(ids.len() as ffi::Py_ssize_t))?;
            let items =
                items_at(list.as_ptr()).filter(|_| *self.direct_items.get_or_init(py, || probe_items(py)));
            for (i, &id) in ids.iter().enumerate() {
                // The ints of a vocabulary are more than a processor keeps close.
                if let Some(&later) = ids.get(i + AHEAD) {
                    prefetch(&*ints[later as usize].as_ptr());
                }
                let int = ints[id as usize].as_ptr();
                *int.cast::<ffi::Py_ssize_t>() += 1;
                match items {
                    Some(items) => *items.add(i) = int,
                    None => {
                        ffi::PyList_SetItem(list.as_ptr(), i as ffi::Py_ssize_t, int);
                    }
                }
            }
            // Ints refer to nothing, so the collector need not walk millions of them again and again, now and as long
            // as the list lives (as it need not for a dict or a tuple of ints). Only somebody who puts an object into
            // the list that refers to the list has to take it out again.
            ffi::PyObject_GC_UnTrack(list.as_ptr().cast());
            Ok(list.cast_into_unchecked())
        }
    }
}

/// How many items before its turn an int is asked for.
const AHEAD: usize = 24;

/// Where a list keeps its items in every CPython so far: the word after object header and length. Null for an empty
/// list.
///
/// # Safety
///
/// `list` is a list. What comes back may be used only if [`probe_items`] holds.
unsafe fn items_at(list: *mut ffi::PyObject) -> Option<*mut *mut ffi::PyObject> {
    // SAFETY: a list object has at least five words: header, length, items and the room for them.
    let items = unsafe { list.cast::<*mut *mut ffi::PyObject>().add(3).read() };
    (!items.is_null()).then_some(items)
}

/// Whether this interpreter's lists are laid out as [`items_at`] says: known for the versions up to 3.14, and asked
/// once of a list whose items are known.
fn probe_items(py: Python<'_>) -> bool {
    let known =
        [PyString::new(py, "a").into_any(), PyString::new(py, "b").into_any(), py.None().into_bound(py)];
    let Ok(list) = PyList::new(py, &known) else { return false };
    let cpython =
        py.import("sys").and_then(|sys| sys.getattr("implementation")?.getattr("name")?.extract::<String>());
    if py.version_info() >= (3, 15) || !cpython.is_ok_and(|name| name == "cpython") {
        return false;
    }
    // SAFETY: it is a list of three items, of an interpreter whose lists have this layout.
    unsafe {
        items_at(list.as_ptr()).is_some_and(|items| {
            known.iter().enumerate().all(|(i, item)| items.add(i).read() == item.as_ptr())
        })
    }
}

#[pymethods]
impl PyTokenizer {
    /// Read a `tokenizer.json`.
    ///
    /// Raises OSError for a file that cannot be read, ValueError for one that is malformed or that asks for
    /// something this tokenizer does not do exactly.
    #[staticmethod]
    fn from_file(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self::new(enter(py, || Tokenizer::from_file(&path))?))
    }

    /// Read `tokenizer.json` of a checkpoint directory, and `tokenizer_config.json` where there is one.
    ///
    /// Raises as `from_file` does.
    #[staticmethod]
    fn from_directory(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self::new(enter(py, || Tokenizer::from_directory(&path))?))
    }

    /// Token ids of `text`, as a list of int.
    ///
    /// Added tokens that appear in the text become their ids; with `split_special_tokens` the special ones among
    /// them are text like any other. Nothing is put before or after.
    #[pyo3(signature = (text, *, split_special_tokens = false))]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyString>,
        split_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyList>> {
        let text = text.to_str()?;
        let mut ids =
            self.buffer.try_lock().map(|mut buffer| std::mem::take(&mut *buffer)).unwrap_or_default();
        enter(py, || {
            self.inner.encode_to(text, split_special_tokens, &mut ids);
            Ok(())
        })?;
        let list = self.list(py, &ids);
        // One very long text must not hold its memory for ever.
        if ids.capacity() <= 1 << 20
            && let Ok(mut buffer) = self.buffer.try_lock()
        {
            ids.clear();
            *buffer = ids;
        }
        list
    }

    /// `encode`, as a numpy array of uint32, shape [num_tokens].
    #[pyo3(signature = (text, *, split_special_tokens = false))]
    fn encode_array<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyString>,
        split_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyArray1<u32>>> {
        let text = text.to_str()?;
        let ids = enter(py, || Ok(self.inner.encode_with(text, split_special_tokens)))?;
        Ok(PyArray1::from_vec(py, ids))
    }

    /// `encode` of every text, over all cores: a list of lists of int.
    #[pyo3(signature = (texts, *, split_special_tokens = false))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        split_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyList>> {
        let lists = PyList::empty(py);
        for _ in 0..texts.len() {
            lists.append(py.None())?;
        }
        self.for_each_encoded(py, &texts, split_special_tokens, |i, ids| {
            lists.set_item(i, self.list(py, &ids)?)
        })?;
        Ok(lists)
    }

    /// `encode_array` of every text, over all cores: a list of numpy arrays of uint32.
    #[pyo3(signature = (texts, *, split_special_tokens = false))]
    fn encode_batch_array<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        split_special_tokens: bool,
    ) -> PyResult<Vec<Bound<'py, PyArray1<u32>>>> {
        claim().map_err(to_py)?;
        let texts = texts.iter().map(|text| text.to_str()).collect::<PyResult<Vec<_>>>()?;
        let ids = enter(py, || Ok(self.inner.encode_batch(&texts, split_special_tokens)))?;
        Ok(ids.into_iter().map(|ids| PyArray1::from_vec(py, ids)).collect())
    }

    /// Text of `ids`, with U+FFFD for bytes that are not UTF-8.
    ///
    /// `skip_special_tokens` leaves special tokens out. Raises ValueError for an id that is not in the vocabulary.
    #[pyo3(signature = (ids, skip_special_tokens = true))]
    fn decode(&self, py: Python<'_>, ids: Ids, skip_special_tokens: bool) -> PyResult<String> {
        enter(py, || self.inner.decode(&ids.0, skip_special_tokens))
    }

    /// `decode` of every list of ids.
    #[pyo3(signature = (batch, skip_special_tokens = true))]
    fn decode_batch(
        &self,
        py: Python<'_>,
        batch: Vec<Ids>,
        skip_special_tokens: bool,
    ) -> PyResult<Vec<String>> {
        enter(py, || batch.iter().map(|ids| self.inner.decode(&ids.0, skip_special_tokens)).collect())
    }

    /// A decoder for ids that arrive one by one.
    #[pyo3(signature = (skip_special_tokens = true))]
    fn decode_stream(&self, skip_special_tokens: bool) -> PyDecodeStream {
        PyDecodeStream { tokenizer: self.inner.clone(), stream: TextStream::new(skip_special_tokens) }
    }

    /// Id of a token in the spelling of `tokenizer.json`, or None.
    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Token `id` in the spelling of `tokenizer.json`: bytes in GPT-2's printable form, added tokens as they are.
    ///
    /// Raises ValueError for an id that is not in the vocabulary.
    fn id_to_token(&self, py: Python<'_>, id: Id) -> PyResult<String> {
        enter(py, || self.inner.id_to_token(id.0))
    }

    /// The bytes that token `id` decodes to, not always UTF-8.
    ///
    /// Raises ValueError for an id that is not in the vocabulary.
    fn token_bytes<'py>(&self, py: Python<'py>, id: Id) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, enter(py, || self.inner.token_bytes(id.0))?))
    }

    /// Number of ids that can be produced, added tokens included: one more than the largest.
    fn __len__(&self) -> usize {
        self.inner.len()
    }

    /// Number of tokens in the model's own vocabulary, added tokens left out.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    /// Added tokens by text: a dict of str to id.
    #[getter]
    fn added_tokens(&self) -> std::collections::BTreeMap<String, u32> {
        self.inner.added_tokens().iter().map(|token| (token.content.clone(), token.id)).collect()
    }

    /// Ids of the special tokens, ascending: those that decoding leaves out.
    #[getter]
    fn special_ids(&self) -> Vec<u32> {
        self.inner.special_ids().collect()
    }

    /// Id of `eos_token` in `tokenizer_config.json`, or None.
    #[getter]
    fn eos_token_id(&self) -> Option<u32> {
        self.inner.eos_id()
    }

    /// Id of `pad_token` in `tokenizer_config.json`, or None.
    #[getter]
    fn pad_token_id(&self) -> Option<u32> {
        self.inner.pad_id()
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.inner)
    }
}

impl PyTokenizer {
    /// Encodes on rayon's threads and hands each result to `each` on this one as it arrives, with the GIL.
    fn for_each_encoded<'py>(
        &self,
        py: Python<'py>,
        texts: &[Bound<'py, PyString>],
        split_special_tokens: bool,
        mut each: impl FnMut(usize, Vec<u32>) -> PyResult<()>,
    ) -> PyResult<()> {
        claim().map_err(to_py)?;
        let texts = texts.iter().map(|text| text.to_str()).collect::<PyResult<Vec<_>>>()?;
        let (next, threads) = (std::sync::atomic::AtomicUsize::new(0), rayon::current_num_threads());
        // About this many bytes of text per message, and messages that may wait for this thread while Python collects
        // garbage: some twenty megabytes of ids.
        const CHUNK: usize = 1 << 18;
        const SLACK: usize = 64;
        let (sender, receiver) = mpsc::sync_channel::<Vec<(usize, Vec<u32>)>>(2 * threads + SLACK);
        rayon::in_place_scope(|scope| {
            for _ in 0..threads.min(texts.len()) {
                let (sender, texts, next, tokenizer) = (sender.clone(), &texts, &next, &self.inner);
                scope.spawn(move |_| {
                    let (mut chunk, mut bytes) = (Vec::new(), 0);
                    loop {
                        let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        let Some(text) = texts.get(i) else { break };
                        chunk.push((i, tokenizer.encode_with(text, split_special_tokens)));
                        bytes += text.len();
                        if bytes >= CHUNK {
                            bytes = 0;
                            if sender.send(std::mem::take(&mut chunk)).is_err() {
                                return;
                            }
                        }
                    }
                    // The receiver is gone only after an error.
                    let _ = sender.send(chunk);
                });
            }
            drop(sender);
            let mut receiver = receiver;
            loop {
                let mut received = receiver.try_recv().ok();
                if received.is_none() {
                    // Nothing is ready: wait without the GIL, until there is or all senders are gone.
                    (receiver, received) = py.detach(move || {
                        let received = receiver.recv().ok();
                        (receiver, received)
                    });
                }
                let Some(chunk) = received else { return Ok(()) };
                for (i, ids) in chunk {
                    each(i, ids)?;
                }
            }
        })
    }
}

/// A token id from Python; an int that no id can be is refused as an unknown one.
struct Id(u32);

impl<'a, 'py> FromPyObject<'a, 'py> for Id {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let refuse = |found: String| to_py(Error::request("token id", found, "an id of the vocabulary"));
        match object.extract::<i64>() {
            Ok(id) => u32::try_from(id).map(Id).map_err(|_| refuse(id.to_string())),
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
                Err(refuse(object.str()?.to_string()))
            }
            Err(error) => Err(error),
        }
    }
}

/// Token ids from Python: a numpy array of uint32, or any sequence of int.
pub(super) struct Ids(pub(super) Vec<u32>);

impl<'a, 'py> FromPyObject<'a, 'py> for Ids {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(list) = object.cast::<PyList>() {
            let ids = list.iter().map(|item| Ok(Id::extract(item.as_borrowed())?.0));
            return Ok(Ids(ids.collect::<PyResult<_>>()?));
        }
        if let Ok(array) = object.cast::<PyArray1<u32>>() {
            use numpy::PyArrayMethods;
            return Ok(Ids(array.readonly().to_vec().map_err(|e| PyIndexError::new_err(e.to_string()))?));
        }
        let ids: Vec<Id> = object.extract()?;
        Ok(Ids(ids.into_iter().map(|id| id.0).collect()))
    }
}

/// Text of ids that arrive one by one; never half a character.
///
/// What `push` returned so far plus `finish` equals `Tokenizer.decode` of all ids.
#[pyclass(name = "DecodeStream", module = "qwen35rs")]
struct PyDecodeStream {
    tokenizer: Arc<Tokenizer>,
    stream: TextStream,
}

#[pymethods]
impl PyDecodeStream {
    /// The text that becomes certain with token `id`, possibly empty.
    ///
    /// Raises ValueError for an id that is not in the vocabulary; nothing changes then.
    fn push(&mut self, py: Python<'_>, id: Id) -> PyResult<String> {
        let mut out = String::new();
        enter(py, || self.stream.push(&self.tokenizer, id.0, &mut out))?;
        Ok(out)
    }

    /// The rest of the text: U+FFFD where a character was begun and never ended. The stream is empty afterwards.
    fn finish(&mut self) -> String {
        let mut out = String::new();
        self.stream.finish(&mut out);
        out
    }
}
