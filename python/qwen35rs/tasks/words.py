"""Word lists of the task suite: names, common words, places, colors, animals, jobs."""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    words = tuple(text.split())
    assert len(set(words)) == len(words), sorted(w for w in words if words.count(w) > 1)
    return words


NAMES = _split("""
Adam Alex Alice Andrew Anna Anton Ben Bella Brian Carl Carol Chris Clara Dan Daniel David Diana Donald Ella Emma
Eric Eva Fiona Frank Fred George Grace Greg Hanna Harry Helen Henry Howard Ian Irene Iris Ivan Jack James Jane Jason
Jean Jim Joe John Jordan Jose Joseph Josh Julia Karen Karl Kate Kelly Ken Kevin Kim Laura Leo Lewis Lily Linda Louis
Lucy Luke Marc Maria Mark Martin Mary Matt Max Mia Michael Mike Mila Miller Nick Nina Nora Olga Oscar Paul Peter
Philip Rachel Ray Richard Rita Rob Robert Robin Ron Rose Ryan Sam Sara Scott Sofia Stephen Steve Taylor Thomas Tim
Tina Tom Tony Vera Victor William
""")

WORDS = _split("""
able above across action age air alarm alone angle animal answer apple april area arm army art aunt author baby back
bag ball band bank base bath beach bear beauty bed bell best bird birth black blood blue board boat body bone book
border bottle bottom bowl box boy brain branch brand bread break brick bridge bright broad brother brown brush bus
button cable cake call camera camp card care carpet case castle cat cell center chain chair chance change cheap cheese
child choice church circle city class clean clear clock cloth cloud coach coast coat coffee cold color common cook
cool copper copy corner cost cotton count couple course court cover cow crowd cup current dance danger dark date day
deep design desk detail dinner dirty doctor dog door double dragon dream dress drink drive dry duck dust eagle early
earth east easy edge effect egg eight energy engine enough entry equal event every example eye face fact fair fall
family farm fast father field fifth figure film final finger fire first fish five flag flat floor flow flower fly food
foot force forest form forward four free fresh friend front fruit full future game garden gas gate gift girl glass
goal gold good grand grass gray great green ground group growth guard guest guide gun hair half hall hand happy hard
hat head health heart heat heavy help high hill history hobby hole home honey hope horse hospital hot hotel hour
house human hundred ice idea image inside iron island item job join journey juice jump key kind king kitchen knife
lake lamp land large late laugh law leader leaf left leg lemon letter level library life light line lion list little
local lock long love low lunch machine mail main manager map market mask master match math meal meat medal medical
member memory message metal middle milk mind mine minute mirror mobile modern money month moon morning mother motor
mountain mouse mouth movie music nail name narrow nature near neck needle nest new night nine noise normal north nose
note number nurse oak ocean offer office oil old onion open orange order other oven owner page paint pair palace paper
parent park party path pattern peace pen pencil people phone photo piano picture piece pink pipe place plan plane
plant plate player pocket poem point pool poor power present price prince profit public purple queen question quick
quiet rain random rare reader red rest rice rich right ring river road rock roof room root rope rose round route
salt sand scale school science screen sea season seat second secret seed seven shade shape sharp sheep shelf ship
shirt shoe shop short shoulder side silver simple sister six size skill skin sky sleep slow small smart smile smoke
snow soap social soft soil solid song sound soup south space speech speed spirit sport spring square stage stair
stamp star start station steam steel step stick stone store storm story street strong student sugar summer sun
surface sweet swim table tail talk tall taste tax tea teacher team temple ten test text theme thick thin third three
thumb ticket tiger time tiny title today tongue tool tooth top total tower town toy track trade traffic trail train
travel tree trip truck true truth turn twelve twin two uncle under unit upper useful valley value village violin
visit voice wall warm wash watch water wave weather week wheel white wide wife wild win window wine winter wise wolf
woman wonder wood wool word world yard year yellow young zero
""")

CITIES = _split("""
Athens Atlanta Austin Berlin Boston Chicago Dallas Delhi Denver Dublin Geneva Houston Jakarta Lima Lisbon London
Madrid Manila Miami Milan Moscow Mumbai Munich Oslo Paris Prague Rome Seattle Seoul Singapore Stockholm Sydney Tokyo
Toronto Vienna Warsaw Zurich
""")

COUNTRIES = _split("""
Australia Austria Brazil Canada China Egypt England France Georgia Germany Greece India Iran Ireland Israel Italy
Japan Kenya Mexico Norway Pakistan Poland Russia Scotland Spain Sweden Turkey
""")

COLORS = _split("black blue brown gold gray green orange pink purple red silver white yellow")

ANIMALS = _split("bear bird cat cow dog duck eagle fish horse lion mouse rabbit sheep snake tiger wolf")

JOBS = _split("""
actor artist baker carpenter cook dentist doctor driver engineer farmer gardener judge lawyer manager nurse painter
pilot player singer teacher waiter writer
""")

FOODS = _split("apple bread butter cake cheese chicken egg fish honey lemon pasta pizza rice salad soup tea")

DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

LANGUAGES = _split(
    "Arabic Chinese English French German Greek Italian Japanese Korean Polish Russian Spanish"
)

ROOMS = ("bathroom", "bedroom", "garage", "garden", "hall", "kitchen", "living room", "office")

ADJECTIVES = _split("""
big bright broad cheap clean clear cold common cool dark deep dry early easy empty fair fast final fresh full good
great happy hard heavy high hot large late light little local long low modern narrow new old open poor quick quiet
rare red rich right round sharp short simple slow small soft strong sweet tall thick thin tiny warm wet white wide
wild wise young
""")

VERBS = _split("""
asked brought built called carried chose cleaned closed covered crossed cut drew drove followed found gave held helped
hid kept knew left liked lost loved made met moved needed opened painted passed played pulled pushed reached read
saved saw sent showed sold started stopped took touched turned used visited wanted washed watched
""")
