//! Owns lines on their way to a file or a descriptor: a bounded queue, and one thread that writes. Whoever has something to
//! say never waits: not for a full disk, not for a reader that has stalled. What does not fit is dropped and counted.
//! Must not know what the lines are about. `Log` may be used on any thread; everything below `Writer` runs on the log's own.
//!
//! ```text
//!  JavaScript thread --- line ---+
//!  I/O thread -------- record ---+--> queue (bounded) --> keygate-log: format, write --> file, pipe, terminal
//! ```

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::stats::Counter;

/// What waits for the writer: so many lines, and of those that come as text so many bytes.
const WAITING_MAX: usize = 4096;
const WAITING_BYTES_MAX: usize = 8 * 1024 * 1024;
/// How long records are collected before they are written: waking the writer for each would cost more than the line.
const COLLECT: Duration = Duration::from_millis(20);
/// A write of several lines. To a pipe, which several processes share, no more than what it takes as one piece (PIPE_BUF, pipe(7)).
const CHUNK_BYTES_MAX: usize = 256 * 1024;
const PIPE_CHUNK_BYTES_MAX: usize = libc::PIPE_BUF;
/// To a unix socket, as systemd has them for standard output: the kernel takes what fits into one buffer as one piece
/// (32 KiB and more), and others get in between the pieces of more.
const SOCKET_CHUNK_BYTES_MAX: usize = 16 * 1024;
/// How often `flush` tries to get into a queue that is full.
const FLUSH_POLL: Duration = Duration::from_millis(2);

/// Who has a line in a log: the counts are kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A line of text, given as such.
    Line,
    /// Made into a line by the log's thread.
    Record,
}

/// Something that is cheaper to hand over than to write down.
pub trait Record: Send {
    /// Appends one line, without its end; `for_people`: not JSON, because it is read on a terminal.
    fn write(&self, line: &mut Vec<u8>, for_people: bool);
}

/// Lines by what became of them.
#[derive(Debug, Default)]
pub struct LineCounts {
    pub written: Counter,
    /// The queue was full, or the write failed.
    pub dropped: Counter,
}

#[derive(Debug, Default)]
pub struct LogStats {
    pub lines: LineCounts,
    pub records: LineCounts,
}

impl LogStats {
    fn of(&self, kind: Kind) -> &LineCounts {
        match kind {
            Kind::Line => &self.lines,
            Kind::Record => &self.records,
        }
    }
}

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    StandardOutput,
    /// Appended to; made with this mode when it is not there. With a mode that lets nobody else in, one that is there must be
    /// as private: a regular file of this user's, no link.
    File {
        path: PathBuf,
        mode: u32,
    },
}

/// A log, to be cloned for everyone who has something to say.
#[derive(Clone)]
pub struct Log {
    queue: SyncSender<Entry>,
    shared: Arc<Shared>,
}

struct Shared {
    target: Target,
    /// Opened anew, for the writer to take before its next line.
    reopened: Mutex<Option<File>>,
    waiting_bytes: AtomicUsize,
    stats: LogStats,
}

enum Entry {
    Line(Box<[u8]>),
    Record(Box<dyn Record>),
    /// To be dropped when everything before it is written.
    Flush(SyncSender<()>),
    /// There is another file: without it a log that has nothing to say would keep the old one.
    Reopened,
}

impl Log {
    /// Opens the target and starts the log's thread, which ends with the last clone.
    ///
    /// # Errors
    /// The file cannot be opened for appending, or the thread not started.
    pub fn open(target: Target) -> io::Result<Self> {
        let file = open(&target)?;
        let (queue, waiting) = sync_channel(WAITING_MAX);
        let shared = Arc::new(Shared {
            target,
            reopened: Mutex::new(None),
            waiting_bytes: AtomicUsize::new(0),
            stats: LogStats::default(),
        });
        let writer = Writer::new(file, shared.clone());
        thread::Builder::new().name("keygate-log".into()).spawn(move || writer.run(&waiting))?;
        Ok(Self { queue, shared })
    }

    /// `line` without its end.
    pub fn line(&self, line: &[u8]) {
        let waiting_bytes = &self.shared.waiting_bytes;
        let fits = waiting_bytes.fetch_add(line.len(), Relaxed) + line.len() <= WAITING_BYTES_MAX;
        if !fits || self.queue.try_send(Entry::Line(line.into())).is_err() {
            waiting_bytes.fetch_sub(line.len(), Relaxed);
            self.shared.stats.lines.dropped.add(1);
        }
    }

    pub fn record(&self, record: Box<dyn Record>) {
        if self.queue.try_send(Entry::Record(record)).is_err() {
            self.shared.stats.records.dropped.add(1);
        }
    }

    /// Opens the file again by its name, after somebody has renamed or removed it. The old one is written to until then.
    ///
    /// # Errors
    /// It cannot be opened; the old one stays in use.
    pub fn reopen(&self) -> io::Result<()> {
        if self.shared.target == Target::StandardOutput {
            return Ok(());
        }
        let file = open(&self.shared.target)?;
        *self.shared.reopened.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
        // A queue that is full wakes the writer too.
        let _ = self.queue.try_send(Entry::Reopened);
        Ok(())
    }

    /// Waits until what was said before is written, or has failed to be; at most `budget`. Whether it came to that.
    pub fn flush(&self, budget: Duration) -> bool {
        let until = Instant::now() + budget;
        let (done, flushed) = sync_channel(0);
        let mut entry = Entry::Flush(done);
        loop {
            match self.queue.try_send(entry) {
                Ok(()) => break,
                Err(TrySendError::Full(same)) if Instant::now() < until => entry = same,
                Err(_) => return false,
            }
            thread::sleep(FLUSH_POLL);
        }
        let left = until.saturating_duration_since(Instant::now());
        // Nothing is ever sent: the other end is dropped.
        matches!(flushed.recv_timeout(left), Err(RecvTimeoutError::Disconnected))
    }

    pub fn stats(&self) -> &LogStats {
        &self.shared.stats
    }
}

fn open(target: &Target) -> io::Result<File> {
    match target {
        Target::StandardOutput => Ok(File::from(standard_output()?)),
        Target::File { path, mode } => open_file(path, *mode),
    }
}

/// O_NONBLOCK: opening a FIFO that nobody reads must fail, and not wait.
fn open_file(path: &Path, mode: u32) -> io::Result<File> {
    let is_private = mode & 0o077 == 0;
    let flags = libc::O_NONBLOCK | if is_private { libc::O_NOFOLLOW } else { 0 };
    let file = OpenOptions::new().append(true).create(true).mode(mode).custom_flags(flags).open(path)?;
    if is_private {
        refuse_exposed(&file.metadata()?)?;
    }
    Ok(file)
}

/// Somebody may have put a file there before, to read what is written to it.
fn refuse_exposed(found: &Metadata) -> io::Result<()> {
    // SAFETY: no arguments, and it cannot fail.
    let own = unsafe { libc::geteuid() };
    let problem = if !found.is_file() {
        "it is not a regular file".into()
    } else if found.uid() != own {
        format!("it belongs to user {}, and not to {own}, who writes it", found.uid())
    } else if found.mode() & 0o077 != 0 {
        format!("it is open to others (mode {:o}, expected 600)", found.mode() & 0o777)
    } else {
        return Ok(());
    };
    Err(io::Error::new(ErrorKind::PermissionDenied, problem))
}

/// A descriptor of our own: what is inherited stays open whatever happens to this one.
fn standard_output() -> io::Result<OwnedFd> {
    io::stdout().as_fd().try_clone_to_owned()
}

/// The log's thread.
struct Writer {
    file: File,
    chunk_bytes_max: usize,
    for_people: bool,
    shared: Arc<Shared>,
    /// Whole lines to be written together.
    chunk: Vec<u8>,
    /// How many of each kind they are.
    lines: u64,
    records: u64,
    /// A write has ended inside a line: the next one begins on a new one.
    torn: bool,
}

impl Writer {
    fn new(file: File, shared: Arc<Shared>) -> Self {
        let (chunk_bytes_max, for_people) = (chunk_bytes_max(&file), file.is_terminal());
        Self {
            file,
            chunk_bytes_max,
            for_people,
            shared,
            chunk: Vec::new(),
            lines: 0,
            records: 0,
            torn: false,
        }
    }

    fn run(mut self, waiting: &Receiver<Entry>) {
        while let Ok(first) = waiting.recv() {
            if matches!(first, Entry::Record(_)) {
                thread::sleep(COLLECT);
            }
            self.take(first);
            // No more than there can be at once: those who flush are told in time.
            for entry in waiting.try_iter().take(WAITING_MAX) {
                self.take(entry);
            }
            self.write();
        }
    }

    fn take(&mut self, entry: Entry) {
        let before = self.chunk.len();
        let kind = match entry {
            Entry::Flush(done) => {
                self.write();
                return drop(done);
            }
            Entry::Reopened => return self.write(),
            Entry::Line(line) => {
                self.shared.waiting_bytes.fetch_sub(line.len(), Relaxed);
                self.chunk.extend_from_slice(&line);
                Kind::Line
            }
            Entry::Record(record) => {
                record.write(&mut self.chunk, self.for_people);
                Kind::Record
            }
        };
        self.chunk.push(b'\n');
        if self.chunk.len() > self.chunk_bytes_max && before > 0 {
            let last = self.chunk.split_off(before);
            self.write();
            self.chunk = last;
        }
        *self.waiting(kind) += 1;
    }

    fn waiting(&mut self, kind: Kind) -> &mut u64 {
        match kind {
            Kind::Line => &mut self.lines,
            Kind::Record => &mut self.records,
        }
    }

    /// Writes the chunk, whatever that takes: everybody else goes on meanwhile.
    fn write(&mut self) {
        if let Some(file) = self.shared.reopened.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.chunk_bytes_max = chunk_bytes_max(&file);
            self.file = file;
            self.torn = false;
        }
        if self.chunk.is_empty() {
            return;
        }
        if std::mem::take(&mut self.torn) {
            self.chunk.insert(0, b'\n');
        }
        let (written, result) = write_all(&mut self.file, &self.chunk);
        self.torn = written > 0 && result.is_err();
        for kind in [Kind::Line, Kind::Record] {
            let count = std::mem::take(self.waiting(kind));
            let counts = self.shared.stats.of(kind);
            match result {
                Ok(()) => counts.written.add(count),
                Err(_) => counts.dropped.add(count),
            }
        }
        self.chunk.clear();
        self.chunk.shrink_to(CHUNK_BYTES_MAX);
    }
}

/// How much was written, and whether that was all.
fn write_all(file: &mut File, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => return (written, Err(ErrorKind::WriteZero.into())),
            Ok(more) => written += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => wait_writable(file),
            Err(error) => return (written, Err(error)),
        }
    }
    (written, Ok(()))
}

/// For a pipe or a terminal that somebody has made non-blocking.
fn wait_writable(file: &File) {
    let mut wanted = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one pollfd that lives through the call.
    let _ = unsafe { libc::poll(&mut wanted, 1, -1) };
}

fn chunk_bytes_max(file: &File) -> usize {
    match file.metadata() {
        Ok(metadata) if metadata.file_type().is_socket() => SOCKET_CHUNK_BYTES_MAX,
        Ok(metadata) if !metadata.file_type().is_fifo() => CHUNK_BYTES_MAX,
        _ => PIPE_CHUNK_BYTES_MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::PermissionsExt;

    const SHORT: Duration = Duration::from_secs(10);

    struct Text(&'static str);

    impl Record for Text {
        fn write(&self, line: &mut Vec<u8>, _for_people: bool) {
            line.extend_from_slice(self.0.as_bytes());
        }
    }

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("keygate-log-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory");
        path
    }

    fn target(directory: &Path) -> Target {
        Target::File { path: directory.join("a.log"), mode: 0o640 }
    }

    fn lines_of(path: &Path) -> Vec<String> {
        std::fs::read_to_string(path).expect("a file").lines().map(str::to_owned).collect()
    }

    /// A log into a pipe, and the end to read from.
    fn piped() -> (Log, File) {
        let mut ends = [0; 2];
        // SAFETY: pipe writes two descriptors into the array.
        assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
        // SAFETY: both were made a moment ago and belong to nobody else.
        let [reader, writer] = ends.map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
        (log_into(writer), reader)
    }

    fn log_into(file: File) -> Log {
        let (queue, waiting) = sync_channel(WAITING_MAX);
        let shared = Arc::new(Shared {
            target: Target::StandardOutput,
            reopened: Mutex::new(None),
            waiting_bytes: AtomicUsize::new(0),
            stats: LogStats::default(),
        });
        let thread = Writer::new(file, shared.clone());
        thread::spawn(move || thread.run(&waiting));
        Log { queue, shared }
    }

    #[test]
    fn lines_and_records_come_in_the_order_in_which_they_were_said() {
        let directory = directory("order");
        let log = Log::open(target(&directory)).expect("a log");
        log.line(b"first");
        log.record(Box::new(Text("second")));
        log.line(b"third");
        assert!(log.flush(SHORT));
        assert_eq!(lines_of(&directory.join("a.log")), ["first", "second", "third"]);
        assert_eq!(log.stats().lines.written.get(), 2);
        assert_eq!(log.stats().records.written.get(), 1);
        std::fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn a_renamed_file_is_written_to_until_it_is_opened_again() {
        let directory = directory("rename");
        let path = directory.join("a.log");
        let log = Log::open(target(&directory)).expect("a log");
        log.line(b"one");
        assert!(log.flush(SHORT));
        std::fs::rename(&path, directory.join("a.log.1")).expect("renamed");
        log.line(b"two");
        assert!(log.flush(SHORT));
        log.reopen().expect("opened again");
        log.line(b"three");
        assert!(log.flush(SHORT));
        assert_eq!(lines_of(&directory.join("a.log.1")), ["one", "two"]);
        assert_eq!(lines_of(&path), ["three"]);
        std::fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn a_log_that_says_nothing_lets_go_of_the_old_file() {
        let directory = directory("quiet");
        let path = directory.join("a.log");
        let log = Log::open(target(&directory)).expect("a log");
        let old = path.metadata().expect("a file").ino();
        std::fs::rename(&path, directory.join("a.log.1")).expect("renamed");
        log.reopen().expect("opened again");
        let has_old = || {
            std::fs::read_dir("/proc/self/fd")
                .expect("descriptors")
                .flatten()
                .any(|fd| std::fs::metadata(fd.path()).is_ok_and(|open| open.ino() == old))
        };
        let until = Instant::now() + SHORT;
        while has_old() {
            assert!(Instant::now() < until, "the old file is still open");
            thread::yield_now();
        }
        std::fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn what_only_its_user_may_read_is_not_written_to_what_others_can() {
        let directory = directory("private");
        let path = directory.join("keys.log");
        let open = || Log::open(Target::File { path: path.clone(), mode: 0o600 });
        drop(open().expect("made"));
        assert_eq!(path.metadata().expect("a file").mode() & 0o777, 0o600);
        drop(open().expect("its own, again"));

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("opened to others");
        let refused = open().err().expect("refused").to_string();
        assert_eq!(refused, "it is open to others (mode 640, expected 600)");

        std::fs::rename(&path, directory.join("elsewhere")).expect("renamed");
        std::os::unix::fs::symlink(directory.join("elsewhere"), &path).expect("a link");
        assert_eq!(open().err().and_then(|error| error.raw_os_error()), Some(libc::ELOOP));
        std::fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn lines_of_several_writers_to_one_socket_stay_whole() {
        const LINES: usize = 400;
        let (reader, writer) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let texts: [&'static str; 4] = ["a", "b", "c", "d"].map(|letter| &*letter.repeat(600).leak());
        let writers = texts.map(|text| {
            let log = log_into(File::from(OwnedFd::from(writer.try_clone().expect("a clone"))));
            thread::spawn(move || {
                for _ in 0..LINES {
                    log.record(Box::new(Text(text)));
                }
                assert!(log.flush(SHORT));
            })
        });
        // Until nothing more fits: from then on each waits in turn for room.
        let mut room = libc::pollfd { fd: writer.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd that lives through the call.
        while unsafe { libc::poll(&raw mut room, 1, 0) } != 0 {
            thread::yield_now();
        }
        drop(writer);
        let lines: Vec<String> =
            std::io::BufRead::lines(io::BufReader::new(reader)).map(|line| line.expect("a line")).collect();
        for writer in writers {
            writer.join().expect("all written");
        }
        assert_eq!(lines.len(), texts.len() * LINES);
        assert!(lines.iter().all(|line| texts.contains(&line.as_str())));
    }

    #[test]
    fn a_file_that_cannot_be_opened_again_leaves_the_old_one_in_use() {
        let directory = directory("reopen");
        let path = directory.join("a.log");
        let log = Log::open(target(&directory)).expect("a log");
        std::fs::rename(&path, directory.join("a.log.1")).expect("renamed");
        std::fs::create_dir(&path).expect("in the way");
        assert!(log.reopen().is_err());
        log.line(b"still heard");
        assert!(log.flush(SHORT));
        assert_eq!(lines_of(&directory.join("a.log.1")), ["still heard"]);
        std::fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn a_reader_that_has_stalled_costs_lines_and_no_time() {
        let (log, mut reader) = piped();
        let said = (WAITING_MAX + 10_000) as u64;
        for _ in 0..said {
            log.line(&[b'x'; 99]);
        }
        assert!(!log.flush(Duration::from_millis(20)), "the pipe is full");
        let dropped = log.stats().lines.dropped.get();
        assert!(dropped > 0);
        // A reader that comes back gets everything that was not dropped, in whole lines.
        let stats = log.shared.clone();
        drop(log);
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("read to its end");
        assert!(text.lines().all(|line| line.len() == 99));
        assert_eq!(text.lines().count() as u64 + dropped, said);
        assert_eq!(stats.stats.lines.written.get() + dropped, said);
    }

    #[test]
    fn a_line_longer_than_a_pipe_takes_at_once_is_written_whole() {
        let (log, mut reader) = piped();
        let long = vec![b'y'; 3 * PIPE_CHUNK_BYTES_MAX];
        log.line(b"before");
        log.line(&long);
        log.line(b"after");
        assert!(log.flush(SHORT));
        drop(log);
        let mut text = Vec::new();
        reader.read_to_end(&mut text).expect("read to its end");
        let lines: Vec<_> = text.split(|byte| *byte == b'\n').collect();
        assert_eq!(lines, [b"before".as_slice(), &long, b"after", b""]);
    }

    #[test]
    fn text_that_waits_is_bounded_in_bytes_as_well() {
        let (log, _reader) = piped();
        let line = vec![b'z'; 1024 * 1024];
        for _ in 0..20 {
            log.line(&line);
        }
        let dropped = log.stats().lines.dropped.get();
        assert!((10..=12).contains(&dropped), "{dropped} of 20 MiB were dropped");
    }

    #[test]
    fn a_disk_that_is_full_costs_lines_and_is_used_again_when_it_is_not() {
        let log = Log::open(Target::File { path: "/dev/full".into(), mode: 0o640 }).expect("a log");
        log.line(b"lost");
        log.record(Box::new(Text("lost")));
        assert!(log.flush(SHORT));
        assert_eq!(log.stats().lines.dropped.get(), 1);
        assert_eq!(log.stats().records.dropped.get(), 1);
        let directory = directory("full");
        let file = open_file(&directory.join("a.log"), 0o640).expect("a file");
        *log.shared.reopened.lock().expect("not poisoned") = Some(file);
        log.line(b"heard");
        assert!(log.flush(SHORT));
        assert_eq!(lines_of(&directory.join("a.log")), ["heard"]);
        std::fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn a_fifo_that_nobody_reads_is_refused_at_once() {
        let directory = directory("fifo");
        let path = directory.join("a.log");
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).expect("no zero in it");
        // SAFETY: a path that ends with a zero and lives through the call.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        assert!(Log::open(target(&directory)).is_err());
        std::fs::remove_dir_all(directory).expect("removed");
    }
}
