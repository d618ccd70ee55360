//! Pre-shared keys: 32 random bytes with a name, which both ends of a session have.
//!
//! A key file has one key a line: `NAME SECRET [WORD]...`, where SECRET is 64 hexadecimal digits. Empty lines, and lines that begin
//! with `#`, say nothing. The words after the secret are the server's rules for that key; this module hands them on unread.
//! A client uses the first key of its file.

use std::{
    fmt,
    io::Write,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    str::FromStr,
};

use rustix::{
    io::Errno,
    rand::{GetRandomFlags, getrandom},
};

use crate::error::Error;

/// Longest name of a key, bytes.
pub const MAX_KEY_NAME: usize = 32;
/// The environment variable that holds a key: `NAME SECRET`.
pub const KEY_VARIABLE: &str = "FERVOR_KEY";
/// The environment variable that names a key file.
pub const KEY_FILE_VARIABLE: &str = "FERVOR_KEY_FILE";

/// A pre-shared key. It is shown without its secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Key {
    name: String,
    secret: [u8; 32],
    rules: Vec<String>,
    /// See [`KeyRing::limit`].
    limited: bool,
}

impl Key {
    /// A new key called `name`, drawn from the system's random numbers.
    ///
    /// # Errors
    /// A name that is none; the system has no random numbers.
    pub fn generate(name: &str) -> Result<Self, Error> {
        check_name(name).map_err(Error::BadKey)?;
        let mut secret = [0; 32];
        random(&mut secret)?;
        Ok(Self { name: name.to_owned(), secret, rules: Vec::new(), limited: false })
    }

    /// The key in the environment: the first of [`KeyRing::from_environment`].
    ///
    /// # Errors
    /// As there.
    pub fn from_environment() -> Result<Option<Self>, Error> {
        Ok(KeyRing::from_environment()?.first().cloned())
    }

    /// Its name, which crosses the wire in clear.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The words after the secret.
    pub fn rules(&self) -> &[String] {
        &self.rules
    }

    /// See [`KeyRing::limit`].
    pub(crate) fn is_limited(&self) -> bool {
        self.limited
    }

    pub(crate) fn secret(&self) -> &[u8; 32] {
        &self.secret
    }

    /// The line of a key file that says it.
    pub fn line(&self) -> String {
        let secret: String = self.secret.iter().map(|byte| format!("{byte:02x}")).collect();
        let words = std::iter::once(&self.name).chain([&secret]).chain(&self.rules);
        words.map(String::as_str).collect::<Vec<_>>().join(" ")
    }

    /// Writes a new key file that only its owner can read.
    ///
    /// # Errors
    /// There is such a file; it cannot be written.
    pub fn write_new(&self, path: &Path) -> Result<(), Error> {
        let call = |what: &str| Error::io(format!("{what}({})", path.display()));
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(path).map_err(call("create"))?;
        writeln!(file, "{}", self.line()).and_then(|()| file.sync_all()).map_err(call("write"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.name)
    }
}

/// Fills `bytes`, 256 at most, with random numbers of the system.
///
/// # Errors
/// It has none.
pub(crate) fn random(bytes: &mut [u8]) -> Result<(), Error> {
    loop {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            // Of so few bytes none are left out.
            Ok(count) if count == bytes.len() => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Error::io("getrandom")(error.into())),
        }
    }
}

fn check_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > MAX_KEY_NAME || !name.chars().all(plain) {
        return Err(format!(
            "`{name}` is no name of a key: it has 1 to {MAX_KEY_NAME} letters, digits, and any of -_."
        ));
    }
    Ok(())
}

impl FromStr for Key {
    type Err = Error;

    fn from_str(line: &str) -> Result<Self, Error> {
        let bad = |reason: &str| {
            Error::BadKey(format!(
                "{reason}; a key is written `NAME SECRET`, and `fervor-server keygen` makes one"
            ))
        };
        let mut words = line.split_whitespace();
        let name = words.next().ok_or_else(|| bad("it is empty"))?;
        check_name(name).map_err(Error::BadKey)?;
        let digits = words.next().ok_or_else(|| bad("it has no secret"))?;
        if digits.len() != 64 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            // Not the digits themselves: they may be a secret with a slip of the pen.
            return Err(bad(&format!("the secret of `{name}` is not 64 hexadecimal digits")));
        }
        let mut secret = [0; 32];
        for (byte, pair) in secret.iter_mut().zip(digits.as_bytes().chunks(2)) {
            let pair = str::from_utf8(pair).expect("hexadecimal digits");
            *byte = u8::from_str_radix(pair, 16).expect("hexadecimal digits");
        }
        let rules = words.map(str::to_owned).collect();
        Ok(Self { name: name.to_owned(), secret, rules, limited: false })
    }
}

/// The keys that a server takes.
#[derive(Debug, Clone, Default)]
pub struct KeyRing(Vec<Key>);

impl KeyRing {
    /// The keys of the file at `path`, of which there is at least one.
    ///
    /// # Errors
    /// It cannot be read; others than its owner can read it; a line is no key, or names a key again.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let call = |what: &str| Error::io(format!("{what}({})", path.display()));
        let mode = std::fs::metadata(path).map_err(call("stat"))?.mode();
        let bad = |reason: String| Error::BadKey(format!("{}: {reason}", path.display()));
        if mode & 0o077 != 0 {
            return Err(bad(format!(
                "its mode is {:o}, so others than its owner can read it; run `chmod 600 {}`",
                mode & 0o777,
                path.display()
            )));
        }
        let text = std::fs::read_to_string(path).map_err(call("read"))?;
        let mut keys: Vec<Key> = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let key: Key = line.parse().map_err(|error| match error {
                Error::BadKey(reason) => bad(format!("line {}: {reason}", number + 1)),
                error => error,
            })?;
            if keys.iter().any(|other| other.name == key.name) {
                return Err(bad(format!("line {}: there is a key `{}` already", number + 1, key.name)));
            }
            keys.push(key);
        }
        if keys.is_empty() {
            return Err(bad("there is no key in it; `fervor-server keygen` makes one".to_owned()));
        }
        Ok(Self(keys))
    }

    /// Has the holders of the keys for which `which` is true come by those ways alone whose connections can be
    /// [limited](crate::transport::Request::limit): by TCP.
    pub fn limit(&mut self, which: impl Fn(&Key) -> bool) {
        for key in &mut self.0 {
            key.limited = which(key);
        }
    }

    /// The keys in the environment: that in [`KEY_VARIABLE`], else those of the file that [`KEY_FILE_VARIABLE`] names. A variable that is
    /// set to nothing is not set.
    ///
    /// # Errors
    /// What is there is no key; the file cannot be read.
    pub fn from_environment() -> Result<Self, Error> {
        let bad = |reason: String| Error::BadKey(format!("{KEY_VARIABLE}: {reason}"));
        match std::env::var(KEY_VARIABLE) {
            Ok(text) if !text.is_empty() => match text.parse() {
                Ok(key) => return Ok(Self(vec![key])),
                Err(Error::BadKey(reason)) => return Err(bad(reason)),
                Err(error) => return Err(error),
            },
            Err(error @ std::env::VarError::NotUnicode(_)) => return Err(bad(error.to_string())),
            Ok(_) | Err(std::env::VarError::NotPresent) => {}
        }
        match std::env::var_os(KEY_FILE_VARIABLE) {
            Some(path) if !path.is_empty() => Self::read(Path::new(&path)),
            _ => Ok(Self::default()),
        }
    }

    /// The key called `name`.
    pub fn find(&self, name: &str) -> Option<&Key> {
        self.0.iter().find(|key| key.name == name)
    }

    /// The first key.
    pub fn first(&self) -> Option<&Key> {
        self.0.first()
    }

    /// All of them.
    pub fn keys(&self) -> &[Key] {
        &self.0
    }

    /// Whether there is none: then sessions are encrypted, and anybody may open one.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<Key> for KeyRing {
    fn from_iter<I: IntoIterator<Item = Key>>(keys: I) -> Self {
        Self(keys.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_written_for_its_owner_and_read_again() {
        let folder = std::env::temp_dir().join(format!("fervor-keys-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("key");
        let _ = std::fs::remove_file(&path);
        let key = Key::generate("team-a").unwrap();
        key.write_new(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(KeyRing::read(&path).unwrap().first(), Some(&key));
        assert!(key.write_new(&path).unwrap_err().to_string().contains("exists"), "it is not overwritten");

        let twice = format!("# two\n\n{}\n{} role=read tables=a*\n", key.line(), key.line());
        std::fs::write(&path, twice).unwrap();
        let error = KeyRing::read(&path).unwrap_err().to_string();
        assert!(error.contains("line 4") && error.contains("`team-a` already"), "{error}");

        let rules = format!("{} role=read tables=a*", key.line());
        std::fs::write(&path, &rules).unwrap();
        let ring = KeyRing::read(&path).unwrap();
        assert_eq!(ring.find("team-a").unwrap().rules(), ["role=read", "tables=a*"]);
        assert_eq!(ring.find("team-a").unwrap().line(), rules);
        assert!(ring.find("team-b").is_none());

        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
        let error = KeyRing::read(&path).unwrap_err().to_string();
        assert!(error.contains("640") && error.contains("chmod 600"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_is_no_key_is_refused_without_showing_the_secret() {
        let secret = "ab".repeat(32);
        for (text, what) in [
            (String::new(), "empty"),
            ("a".to_owned(), "no secret"),
            (format!("a/b {secret}"), "`a/b`"),
            (format!("{} {secret}", "a".repeat(33)), "1 to 32"),
            (format!("a {}", &secret[1..]), "64 hexadecimal"),
            (format!("a {}g", &secret[1..]), "64 hexadecimal"),
        ] {
            let error = text.parse::<Key>().unwrap_err().to_string();
            assert!(error.contains(what) && !error.contains(&secret[2..]), "{text}: {error}");
        }
        let key: Key = format!("a {secret}").parse().unwrap();
        assert_eq!(format!("{key:?}"), "Key(a)");
    }
}
